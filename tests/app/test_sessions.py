"""Pictures in the making: what a session holds while it runs and afterwards."""

from __future__ import annotations

import pickle
import time
from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest

from app.plan import Order, Subject, check, default_prompt
from app.services import Services
from app.sessions import Sessions
from app.ui.stage import results, shot_html, status
from mole_diffusion.errors import InvalidRequest
from mole_diffusion.png import read_parameters


def test_gates_and_nla_are_made_and_scored_side_by_side(services: Services, trained: Order) -> None:
    trained = replace(trained, count=2)
    session = services.sessions.wait(services.sessions.start([trained, trained.by("nla")]))
    assert [(shot.title, shot.state, shot.error) for shot in session.shots] == [
        ("Learned gates", "done", ""),
        ("NLA", "done", ""),
    ]
    for shot in session.shots:
        assert shot.rendered is not None
        assert [set(step) for step in shot.alignment] == [{"prompt", "bunny", "robot"}] * 4
        assert [set(found) for found in shot.rendered.identity] == [{"bunny", "robot"}] * 2
        assert shot.rendered.labels == {"alignment": "demo CLIP", "identity": "demo CLIP image tower"}
        for place in shot.rendered.identity[0].values():
            left, top, right, bottom = place.box
            assert 0 <= left < right <= 1
            assert 0 <= top < bottom <= 1
    assert session.over
    assert services.sessions.latest() is session


def test_every_picture_keeps_its_parameters_and_no_path(services: Services, trained: Order) -> None:
    session = services.sessions.wait(services.sessions.start([trained]))
    picture = session.shots[0].pictures[0]
    parameters = read_parameters(picture.path)
    assert (parameters["seed"], parameters["steps"], parameters["method"]) == (7, 4, "gates")
    assert [expert["name"] for expert in parameters["composition"]["experts"]] == ["bunny", "robot"]
    assert str(services.settings.data_dir) not in picture.png.decode("latin-1")
    assert str(trained.subjects[0].path.parent) not in picture.png.decode("latin-1")
    assert parameters["identity"]["scorer"] == "demo CLIP image tower"


def test_the_same_order_gives_the_same_pixels(services: Services, order: Order) -> None:
    pictures = [services.generator.render(order).images[0].tobytes() for _ in range(2)]
    assert pictures[0] == pictures[1]


def test_leaving_one_of_two_out_gives_the_other_alone(services: Services, order: Order) -> None:
    masked = services.generator.render(replace(order, left_out=("bunny",)))
    alone = services.generator.render(replace(order, subjects=order.subjects[1:]))
    assert masked.parameters[0]["composition"]["masked"] == ["bunny"]
    assert masked.images[0].tobytes() == alone.images[0].tobytes()


def test_a_session_can_be_stopped(services: Services, order: Order) -> None:
    session = services.sessions.start([replace(order, steps=150), order])
    while not session.shots[0].alignment and not session.over:
        pass
    session.cancel.set()
    services.sessions.wait(session, 60)
    assert [shot.state for shot in session.shots] == ["cancelled", "cancelled"]
    assert len(session.shots[0].alignment) < 150
    assert not services.generator.busy
    assert "Stopped" in status(session)


def test_a_picture_that_waits_for_its_turn_can_be_stopped(services: Services, order: Order) -> None:
    first = services.sessions.start([replace(order, steps=200)])
    until(lambda: bool(first.shots[0].alignment))
    second = services.sessions.start([order])
    until(lambda: second.shots[0].note == "Waiting for the picture before")
    second.cancel.set()
    services.sessions.wait(second, 60)
    assert second.shots[0].state == "cancelled"
    assert not first.over, "it ends at once, not when its turn comes"
    first.cancel.set()
    services.sessions.wait(first, 60)


def until(reached: Callable[[], bool], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not reached():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_on_zero_gpu_an_error_keeps_its_sentence(
    services: Services, order: Order, monkeypatch: pytest.MonkeyPatch
) -> None:
    def lend(_seconds: object) -> Callable[[Callable], Callable]:
        """As ZeroGPU does: what is yielded is pickled, and an exception loses its words."""

        def decorate(function: Callable) -> Callable:
            def lent(*arguments: object) -> Iterator[object]:
                try:
                    for update in function(*arguments):
                        yield pickle.loads(pickle.dumps(update))
                except Exception as error:
                    raise RuntimeError("ZeroGPU worker error") from error

            return lent

        return decorate

    monkeypatch.setattr("app.sessions.on_gpu", lend)
    sessions = Sessions(services.generator, services.settings.data_dir / "images")
    nameless = tuple(replace(subject, trigger="") for subject in order.subjects)
    spans = replace(order, method="spans", subjects=nameless)
    session = sessions.wait(sessions.start([spans, order]))
    assert [shot.state for shot in session.shots] == ["failed", "done"]
    assert "trigger" in session.shots[0].error


def test_an_error_of_one_method_is_a_sentence_and_the_other_goes_on(services: Services, order: Order) -> None:
    nameless = tuple(replace(subject, trigger="") for subject in order.subjects)
    spans = replace(order, method="spans", subjects=nameless)
    session = services.sessions.wait(services.sessions.start([spans, spans.by("nla")]))
    assert [shot.state for shot in session.shots] == ["failed", "done"]
    assert "trigger" in session.shots[0].error
    assert "trigger" in results(session)


def test_a_session_belongs_to_its_visitor(services: Services, order: Order) -> None:
    session = services.sessions.wait(services.sessions.start([order], "ann"))
    assert services.sessions.get(session.id, "ann") is session
    assert services.sessions.get(session.id, "bob") is None
    assert services.sessions.latest("bob") is None


@pytest.mark.parametrize(
    ("change", "word"),
    [({"subjects": ()}, "subject"), ({"prompt": "  "}, "prompt"), ({"method": "gates"}, "gates"),
     ({"steps": 0}, "steps"), ({"count": 9}, "pictures"), ({"seed": -1}, "seed"), ({"guidance": 99.0}, "Guidance"),
     ({"left_out": ("bunny", "robot")}, "left out")],
)  # fmt: skip
def test_impossible_orders_are_refused_before_anything_runs(
    services: Services, order: Order, change: dict[str, object], word: str
) -> None:
    with pytest.raises(InvalidRequest, match=word):
        services.sessions.start([replace(order, **change)])  # type: ignore[arg-type]
    assert services.sessions.latest() is None


def test_two_subjects_of_one_name_are_refused(order: Order) -> None:
    twins = tuple(replace(subject, name="twin") for subject in order.subjects)
    with pytest.raises(InvalidRequest, match="same name"):
        check(replace(order, subjects=twins))


def test_what_is_drawn_names_the_model_of_every_score(services: Services, trained: Order) -> None:
    session = services.sessions.wait(services.sessions.start([trained]))
    drawn = results(session) + shot_html(session.shots[0], session)
    assert "alignment (demo CLIP)" in drawn
    assert "identity (demo CLIP image tower)" in drawn


def test_words_of_a_user_are_escaped(services: Services, order: Order) -> None:
    hostile = tuple(replace(s, name=f"<b onload=x>{i}") for i, s in enumerate(order.subjects))
    session = services.sessions.wait(services.sessions.start([replace(order, subjects=hostile)]))
    drawn = results(session) + shot_html(session.shots[0], session)
    assert "<b onload" not in drawn
    assert "&lt;b onload" in drawn


def test_the_draft_names_every_subject_by_its_trigger(services: Services) -> None:
    entries = services.library.entries()
    assert default_prompt(entries) == "a zwx bunny and a zwx robot on a green background"
    assert default_prompt([]) == ""
    assert Subject.of(entries[0]).text == "a bunny"
