"""Training as the page sees it; that jobs really run and survive is tested with the worker and in the browser."""

from __future__ import annotations

from pathlib import Path

import pytest

from app.jobs import GateRecipe, JobService, duration
from app.services import Services
from app.ui.job_views import curve, head, job_list
from mole_diffusion.errors import InvalidRequest
from tests.app.conftest import Files
from training.jobs.store import JobStore


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
    from training.jobs.run import gate_expert
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


def test_a_failed_job_says_why(services: Services, store: JobStore) -> None:
    job = services.jobs.train_gates("demo", demo(services), GateRecipe())
    store.claim()
    store.set_state(job, "failed", reason="The disk is <full>.")
    assert "The disk is &lt;full&gt;." in head(services.jobs.view(job))


def test_gates_of_a_finished_job_are_offered(services: Services, store: JobStore, trained: object) -> None:
    from app.plan import Order

    assert isinstance(trained, Order) and trained.composition is not None
    experts = [subject.sha256 for subject in trained.subjects]
    assert services.compositions.for_subjects(experts) is None
    job = services.jobs.train_gates("demo", experts, GateRecipe())
    target = services.settings.data_dir / "compositions" / f"{job}.safetensors"
    target.write_bytes(trained.composition.read_bytes())
    store.claim()
    store.set_state(job, "finished", result={"path": f"compositions/{job}.safetensors"})
    found = services.compositions.for_subjects(list(reversed(experts)))
    assert found is not None
    assert (found.path, found.experts, found.family) == (target, tuple(experts), "demo")
    assert services.compositions.for_subjects(experts[:1]) is None


def test_the_estimate_is_a_plain_sentence(services: Services) -> None:
    assert services.jobs.estimate("demo", 300) == "300 steps, about 4 minutes on a laptop without a GPU."
    assert "first job" in services.jobs.estimate("sdxl", 300)


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(3, "5 seconds"), (31, "30 seconds"), (70, "a minute"), (600, "10 minutes"), (9000, "2.5 hours")],
)
def test_durations_are_calm(seconds: float, words: str) -> None:
    assert duration(seconds) == words
