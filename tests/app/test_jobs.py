"""Training as the page sees it; that jobs really run and survive is tested with the worker and in the browser."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from app.jobs import GateRecipe, JobService, JobView, duration
from app.orders import orders_for
from app.plan import Order
from app.services import Services
from app.ui import generate, train
from app.ui.job_views import curve, head, job_list
from mole_diffusion.errors import InvalidRequest
from tests.app.conftest import Files
from training.jobs.limits import Limits
from training.jobs.store import Job, JobEvent, JobStore, Requests


@pytest.fixture
def store(services: Services) -> JobStore:
    """The table that the page's service works on."""
    return JobStore.of(services.settings.data_dir)


def demo(services: Services) -> list[str]:
    return [entry.sha256 for entry in services.library.entries()]


def test_a_job_finds_everything_it_needs(services: Services, store: JobStore) -> None:
    job = store.get(services.jobs.train_gates("demo", demo(services), GateRecipe(steps=30)))
    assert (job.kind, job.state, job.title, job.config["steps"]) == ("gate", "queued", "bunny + robot", 30)
    for expert in job.config["experts"]:
        assert (services.settings.data_dir / "experts" / f"{expert['sha256']}.safetensors").is_file()
        assert Path(expert["views"]).name == "train", "gates never learn from the views they are scored against"


def test_the_trainer_understands_the_configuration(services: Services, store: JobStore) -> None:
    from training.config import parse
    from training.jobs.kinds import gate_expert
    from training.tasks.gate import GateTrainingConfig

    job = store.get(services.jobs.train_gates("demo", demo(services), GateRecipe()))
    config = parse(GateTrainingConfig, job.config)
    experts = [gate_expert(entry, services.settings.data_dir) for entry in config.experts]
    assert [item.phrase for item in experts] == ["zwx bunny", "zwx robot"]
    assert all(item.views is not None for item in experts)


@pytest.mark.parametrize("count", [0, 1])
def test_gates_need_two_subjects(services: Services, count: int) -> None:
    with pytest.raises(InvalidRequest, match="at least two"):
        services.jobs.train_gates("demo", demo(services)[:count], GateRecipe())


def test_a_subject_without_words_cannot_be_trained(services: Services, files: Files) -> None:
    entry = services.library.add(files.robot, "x.safetensors").entry
    services.library.update(entry.sha256, name="x", trigger="", subject_class="")
    with pytest.raises(InvalidRequest, match="neither a trigger nor a class"):
        services.jobs.train_gates("demo", [entry.sha256, demo(services)[-1]], GateRecipe())


def test_subjects_of_one_phrase_are_refused_before_the_job_is_queued(services: Services, files: Files) -> None:
    robot = services.library.add(files.robot, "tin.safetensors").entry
    bunny = services.library.add(files.bunny, "snow.safetensors").entry
    services.library.update(robot.sha256, name="tin", trigger="qvx", subject_class="robot")
    services.library.update(bunny.sha256, name="snow", trigger="QVX robot", subject_class="")
    with pytest.raises(InvalidRequest, match="“tin” and “snow” are both called “QVX robot”"):
        services.jobs.train_gates("demo", [demo(services)[-1], robot.sha256, bunny.sha256], GateRecipe())
    assert services.jobs.list() == []


@pytest.mark.parametrize(
    ("values", "word"),
    [({"scope": "pixel"}, "scope"), ({"steps": 0}, "steps"), ({"lr": -1.0}, "rate"), ({"alpha": -1.0}, "balance")],
)
def test_impossible_recipes_are_refused(values: dict[str, object], word: str) -> None:
    with pytest.raises(InvalidRequest, match=word):
        GateRecipe(**values)  # type: ignore[arg-type]


def test_where_nothing_can_train_the_reason_is_said(services: Services, store: JobStore) -> None:
    from training.jobs.worker import Worker

    folder = services.settings.data_dir
    blocked = JobService(store, Worker(store, folder), services.library, folder, "Not here: no GPU.")
    with pytest.raises(InvalidRequest, match="Not here"):
        blocked.train_gates("demo", demo(services), GateRecipe())


def test_jobs_belong_to_their_visitor(services: Services, files: Files) -> None:
    job = services.jobs.train_gates("demo", demo(services), GateRecipe(), owner="ann")
    assert services.jobs.list("bob") == []
    with pytest.raises(InvalidRequest):
        services.jobs.view(job, "bob")
    with pytest.raises(InvalidRequest):
        services.jobs.cancel(job, "bob")
    services.jobs.cancel(job, "ann")
    assert services.jobs.view(job, "ann").job.state == "cancelled"


def test_a_job_is_paused_resumed_and_retried_by_its_visitor_alone(services: Services, store: JobStore) -> None:
    jobs = services.jobs
    job = jobs.train_gates("demo", demo(services), GateRecipe(), owner="ann")
    for ask in (jobs.pause, jobs.resume, jobs.retry, jobs.save_now, jobs.sample_now):
        with pytest.raises(InvalidRequest, match="no such job"):
            ask(job, "bob")
    store.claim()
    jobs.save_now(job, "ann")
    jobs.sample_now(job, "ann")
    jobs.pause(job, "ann")
    assert store.requests(job) == Requests(cancel=False, pause=True, save=True, sample=True)
    store.set_state(job, "paused")
    jobs.resume(job, "ann")
    store.claim()
    store.set_state(job, "failed", reason="The disk is full.")
    jobs.retry(job, "ann")
    assert jobs.view(job, "ann").job.state == "queued"


def test_a_visitor_has_so_many_jobs_at_most(services: Services, store: JobStore) -> None:
    from training.jobs.worker import Worker

    folder = services.settings.data_dir
    jobs = JobService(store, Worker(store, folder), services.library, folder, limits=Limits(jobs_per_owner=1))
    first = jobs.train_gates("demo", demo(services), GateRecipe(), owner="ann")
    with pytest.raises(InvalidRequest, match="At most 1 job of yours"):
        jobs.train_gates("demo", demo(services), GateRecipe(), owner="ann")
    jobs.cancel(first, "ann")
    jobs.train_gates("demo", demo(services), GateRecipe(), owner="ann")
    with pytest.raises(InvalidRequest, match="At most 1 job of yours"):
        jobs.resume(first, "ann")


def test_a_subject_is_queued_as_the_trainer_takes_it(services: Services, store: JobStore) -> None:
    from training.config import parse
    from training.tasks.subject_config import SubjectConfig

    images = services.settings.data_dir / "subjects" / "upload"
    images.mkdir(parents=True)
    settings = {"base": "sdxl", "token": "zwx", "class": "robot", "adapter": "moslora", "rank": 6, "steps": 20}
    job = store.get(services.jobs.train_subject(settings, images, "8gb", owner="ann"))
    assert (job.kind, job.owner, job.title, job.total) == ("subject", "ann", "zwx robot", 20)
    assert job.config["images"] == "subjects/upload"
    config = parse(SubjectConfig, {name: value for name, value in job.config.items() if name != "images"})
    assert config == SubjectConfig.of("8gb", **settings) and (config.rank, config.resolution) == (6, 512)
    for change, folder, preset, words in (
        ({"rank": 0}, images, None, "rank"),
        ({"colour": "red"}, images, None, "Unknown setting"),
        ({}, images.parent.parent.parent, None, "folder of pictures"),
        ({}, images, "3gb", "preset"),
    ):
        with pytest.raises(InvalidRequest, match=words):
            services.jobs.train_subject({**settings, **change}, folder, preset)


def test_a_running_job_is_drawn_from_the_database(services: Services, store: JobStore) -> None:
    job = services.jobs.train_gates("demo", demo(services), GateRecipe(steps=100))
    assert "Waits for its turn" in head(services.jobs.view(job))
    store.claim()
    for step in range(1, 31):
        store.progress(job, step, 100, 1 / step, {"held_out_loss": 0.5} if step % 10 == 0 else {})
    view = services.jobs.view(job)
    assert len(view.losses) == 30
    assert [step for step, _loss in view.held_out] == [10, 20, 30]
    assert "Step 30 of 100" in head(view)
    assert curve(view).count("<path") == 3
    assert "training" in job_list(services.jobs.list(), job)


def test_only_what_is_new_is_read_again(services: Services, store: JobStore, monkeypatch: pytest.MonkeyPatch) -> None:
    job = services.jobs.train_gates("demo", demo(services), GateRecipe(steps=2000))
    store.claim()
    read: list[int] = []
    events = JobStore.events

    def counted(self: JobStore, *arguments: Any, **options: Any) -> list[JobEvent]:
        found = events(self, *arguments, **options)
        read.append(sum(event.type == "progress" for event in found))
        return found

    monkeypatch.setattr(JobStore, "events", counted)
    for steps in (range(1, 41), range(41, 44), range(44, 44)):
        for step in steps:
            store.progress(job, step, 2000, 1 / step, {"held_out_loss": 0.5})
        read.clear()
        view = services.jobs.view(job)
        assert sum(read) == len(steps)
    assert [step for step, _loss in view.losses] == [step for step, _loss in view.held_out] == list(range(1, 44))
    assert view.seconds_left is not None


def test_the_pace_is_that_of_earlier_jobs(services: Services, store: JobStore) -> None:
    job = services.jobs.train_gates("demo", demo(services), GateRecipe(steps=20))
    store.claim()
    for step in range(1, 21):
        store.progress(job, step, 20, 1.0, {})
    store.set_state(job, "finished", result={})
    assert services.jobs.estimate("demo", 300).endswith("as measured on this machine.")


def test_a_long_curve_is_drawn_with_few_points() -> None:
    many = [(step, 1 / step) for step in range(1, 20_001)]
    assert curve(JobView(_job(total=20_000), many, many, [], [], "", None)).count("L") < 3 * 500


def _job(total: int) -> Job:
    values: dict[str, Any] = dict.fromkeys(field.name for field in fields(Job))
    return Job(**{**values, "state": "running", "step": total, "total": total})


def test_a_failed_job_says_why(services: Services, store: JobStore) -> None:
    job = services.jobs.train_gates("demo", demo(services), GateRecipe())
    store.claim()
    store.set_state(job, "failed", reason="The disk is <full>.")
    assert "The disk is &lt;full&gt;." in head(services.jobs.view(job))


def finished(services: Services, store: JobStore, trained: Order, owner: str = "") -> tuple[str, Path]:
    """A job that has ended well, and its composition."""
    assert trained.composition is not None
    job = services.jobs.train_gates("demo", [subject.sha256 for subject in trained.subjects], GateRecipe(), owner)
    target = services.settings.data_dir / "compositions" / f"{job}.safetensors"
    target.write_bytes(trained.composition.read_bytes())
    store.claim()
    store.set_state(job, "finished", result={"path": f"compositions/{job}.safetensors"})
    return job, target


def test_gates_of_a_finished_job_are_offered(services: Services, store: JobStore, trained: Order) -> None:
    experts = [subject.sha256 for subject in trained.subjects]
    assert services.compositions.for_subjects(experts) is None
    _job, target = finished(services, store, trained)
    found = services.compositions.for_subjects(list(reversed(experts)))
    assert found is not None
    assert (found.path, found.experts, found.family) == (target, tuple(experts), "demo")
    assert services.compositions.for_subjects(experts[:1]) is None


def test_the_gates_of_the_chosen_job_are_used_until_other_subjects_are_chosen(
    services: Services, store: JobStore, trained: Order
) -> None:
    (older, path), (_newer, newest) = (finished(services, store, trained) for _ in range(2))
    experts = [subject.sha256 for subject in trained.subjects]
    handed = train._Handlers(services).picked(older, request=None)
    assert handed == ("demo", experts, str(path))
    page = generate._Handlers(services)
    assert page.pick(handed, request=None)[-4] == str(path)
    assert page.subjects(experts, "demo", "", "", request=None)[-2] == "", "another choice forgets the chosen gates"
    assert [order.composition for order in orders(services, experts, wanted=path)] == [path, None]
    assert orders(services, experts)[0].composition == newest
    assert orders(services, experts, wanted=Path("elsewhere"))[0].composition == newest
    assert orders(services, experts[:1], wanted=path)[0].composition is None


def test_nobody_is_handed_anothers_gates(services: Services, store: JobStore, trained: Order) -> None:
    job, path = finished(services, store, trained, owner="ann")
    with pytest.raises(InvalidRequest):
        services.jobs.made(job, "bob")
    experts = [subject.sha256 for subject in trained.subjects]
    assert orders(services, experts, owner="bob", wanted=path)[0].composition is None
    assert orders(services, experts, owner="ann", wanted=path)[0].composition == path


def orders(services: Services, experts: list[str], owner: str = "", **more: Any) -> list[Order]:
    usual = {"seed": None, "steps": None, "guidance": None, "count": None, "negative": None, "left_out": None}
    request = {"base": "demo", "method": "gates", "prompt": "a zwx robot", "beside": True}
    return orders_for(services, owner, experts=experts, **{**request, **usual, **more})


def test_emptied_fields_stand_for_the_usual_values(services: Services, store: JobStore) -> None:
    from mole_diffusion.bases import get_base

    base, order = get_base("demo"), orders(services, demo(services))[0]
    assert (order.seed, order.count, order.negative) == (0, 1, "")
    assert (order.steps, order.guidance) == (base.default_steps, base.default_guidance)
    page = train._Handlers(services)
    assert "300 steps" in page.estimate("demo", None)
    config = store.get(page.start("demo", demo(services), "token", None, None, None, None, request=None)).config
    assert (config["steps"], config["lr"], config["alpha"], config["seed"]) == (300, None, 0.5, 0)


def test_the_estimate_is_a_plain_sentence(services: Services) -> None:
    assert services.jobs.estimate("demo", 300) == "300 steps, about 4 minutes on a laptop without a GPU."
    assert "first job" in services.jobs.estimate("sdxl", 300)


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(3, "5 seconds"), (31, "30 seconds"), (70, "a minute"), (600, "10 minutes"), (9000, "2.5 hours")],
)
def test_durations_are_calm(seconds: float, words: str) -> None:
    assert duration(seconds) == words
