"""A large base in a local folder goes the whole way without a hub: two uploads, a gate job, a picture."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from app.jobs import GateRecipe
from app.orders import orders_for
from app.scorer import Scorer
from app.services import Services, build_services
from app.sessions import Session
from app.settings import Settings
from app.ui.stage import results, shot_html, status
from mole_diffusion.errors import InvalidRequest
from mole_diffusion.scoring import AlignmentScorer
from tests.tiny import cut_out, tiny_lora, tiny_sdxl
from training.jobs.run import run_job
from training.jobs.store import JobStore

SUBJECTS = {"vase": "red", "alien": "green"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("bases") / "tiny-sdxl"
    tiny_sdxl().save_pretrained(target)
    return target.resolve()


@pytest.fixture
def made(settings: Settings, folder: Path, tmp_path: Path) -> Callable[[Scorer], Session]:
    """Everything from the upload to the pictures, with a scorer."""

    def make(scorer: Scorer) -> Session:
        services = build_services(replace(settings, base_folder=folder), scorer)
        experts = [uploaded(services, tmp_path, name, seed) for seed, name in enumerate(SUBJECTS, 1)]
        train(services, folder, experts)
        orders = orders_for(
            services, "", base=str(folder), experts=experts, method="gates", prompt="a zwx vase and a zwx alien",
            beside=True, seed=3, steps=2, guidance=5.0, count=1, negative="", left_out=[],
        )  # fmt: skip
        return services.sessions.wait(services.sessions.start(orders), 200)

    return make


def uploaded(services: Services, tmp_path: Path, name: str, seed: int) -> str:
    words = {"modelspec.trigger_phrase": f"zwx {name}", "mole.class": name}
    file = tiny_lora(tmp_path / f"{name}.safetensors", tiny_sdxl(), seed=seed, metadata=words)
    entry = services.library.add(file, file.name).entry
    assert entry.family == "sdxl"
    pictures = [tmp_path / f"{name}-{index}.png" for index in range(3)]
    for index, path in enumerate(pictures):
        cut_out(SUBJECTS[name], turn=12.0 * index).save(path)
    services.library.set_views(entry.sha256, pictures=pictures)
    return entry.sha256


def train(services: Services, folder: Path, experts: list[str]) -> None:
    job = services.jobs.train_gates(str(folder), experts, GateRecipe(steps=2))
    store = JobStore.of(services.settings.data_dir)
    claimed = store.claim()
    assert claimed is not None and claimed.id == job
    assert run_job(services.settings.data_dir, job) == 0, store.get(job).reason


def test_with_a_scorer_at_hand_the_picture_is_scored(made: Callable[[Scorer], Session], demo_assets: Path) -> None:
    def local(_base: Any, device: Any) -> AlignmentScorer:
        return AlignmentScorer(f"local-dir:{demo_assets}/demo/clip", "tiny CLIP", device=device)

    session = made(Scorer(local))
    assert [(shot.state, shot.error) for shot in session.shots] == [("done", "")] * 2
    for shot in session.shots:
        assert shot.rendered is not None
        assert shot.rendered.unscored == ""
        assert [set(step) for step in shot.alignment] == [{"prompt", *SUBJECTS}] * 2
        assert [set(found) for found in shot.rendered.identity] == [set(SUBJECTS)]
        assert shot.rendered.parameters[0]["base"] == "tiny-sdxl"
    assert "identity (tiny CLIP image tower)" in results(session)


def test_without_a_scorer_there_is_a_picture_and_the_reason(made: Callable[[Scorer], Session]) -> None:
    def missing(_base: Any, _device: Any) -> AlignmentScorer:
        raise InvalidRequest("OpenCLIP was found neither on this machine nor on the model hub.")

    session = made(Scorer(missing))
    assert [(shot.state, shot.error) for shot in session.shots] == [("done", "")] * 2
    for shot in session.shots:
        assert shot.rendered is not None
        assert (shot.rendered.alignment, shot.rendered.identity, shot.rendered.labels) == ([], [{}], {})
        assert (shot.rendered.parameters[0]["scorer"], shot.rendered.parameters[0]["scores"]) == (None, [])
        drawn = shot_html(shot, session)
        assert "data:image/png" in drawn
        assert "This picture has no scores." in drawn
        assert "neither on this machine nor on the model hub" in drawn
        assert "chart" not in drawn
    assert "<table" not in results(session)
    assert "Parameters" in results(session)
    assert "Done." in status(session)
