"""Who may judge, the score of pictures, early ends, and that all of it resumes exactly."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mole_diffusion import Expert, compose
from mole_diffusion.errors import InvalidRequest
from mole_diffusion.scoring import AlignmentScorer, ClipIdentity
from mole_diffusion.scoring import identity as identity_module
from mole_diffusion.trace import Trace
from tests.tiny import tiny_clip
from tests.training.helpers import load, lora, same, subject
from tests.training.test_loop import StopAfter
from training.best import Best
from training.config import parse
from training.control import Commands
from training.errors import TrainingFailed
from training.events import MemorySink, Progress
from training.loop import run
from training.objectives.gate_stats import gate_stats
from training.objectives.picture_score import PictureScore
from training.tasks.gate import GateTask, GateTrainingConfig
from training.validation import Scorers, resolve_scorers

NAMES = ("robot", "alien")


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """Two image-text models."""
    root = tmp_path_factory.mktemp("clips")
    return f"local-dir:{tiny_clip(root / 'one')}", f"local-dir:{tiny_clip(root / 'two', seed=1)}"


@pytest.fixture(scope="module")
def judge(sources: tuple[str, str]) -> Scorers:
    scorer = AlignmentScorer(sources[1], "two")
    return Scorers(None, scorer, ClipIdentity(scorer), scorer.source)


def settings(**options: Any) -> GateTrainingConfig:
    small = {
        "base": "tiny", "batch": 2, "pool": 6, "validation": 0, "validate_every": 1, "validate_prompts": 2,
        "validate_picture_steps": 2, "scope": "token", "steps": 4, "lr": 0.1,
    }  # fmt: skip
    return parse(GateTrainingConfig, {**small, **options})


def make(folder: Path, work: Path, config: GateTrainingConfig, scorers: Scorers) -> GateTask:
    base, pipe = load(folder)
    experts = [Expert.load(lora(work, pipe, name, seed=seed)) for seed, name in enumerate(NAMES, 1)]
    torch.manual_seed(0)
    composition = compose(pipe, experts, gate=config.gate(2), base=base).attach()
    return GateTask(config, base, pipe, composition, [subject(name) for name in NAMES], scorers)


def test_what_trains_may_not_judge(sources: tuple[str, str]) -> None:
    one, two = (AlignmentScorer(source, label) for source, label in zip(sources, ("one", "two"), strict=True))
    again = AlignmentScorer(sources[0].replace("/one", "/two/../one"), "one by another path")
    for judges in ({"aligns": again}, {"knows": ClipIdentity(again), "knows_by": again.source}):
        with pytest.raises(InvalidRequest, match="proves nothing"):
            Scorers(one, **judges)
    fair = Scorers(one, two, ClipIdentity(two), two.source)
    assert fair.may_report(two.source) and not fair.may_report(again.source)
    assert fair.labels == {"trains": "one", "aligns": "two", "knows": "two image tower"}


def test_models_are_chosen_by_what_trains(
    base_folders: dict[str, Path], sources: tuple[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    base = replace(load(base_folders["sd-v"])[0], alignment_model=sources[0], alignment_label="demo CLIP")
    said: list[str] = []
    clip = resolve_scorers(settings(objective="clip"), base, "cpu", said.append)
    assert clip.labels == {"trains": "demo CLIP", "knows": "EfficientNet-Lite0"}
    collage = resolve_scorers(settings(), base, "cpu", said.append)
    assert collage.labels == {"aligns": "demo CLIP", "knows": "EfficientNet-Lite0"}
    assert resolve_scorers(settings(stop_on="loss", validation=2), base, "cpu", said.append) == Scorers() and not said
    other = resolve_scorers(settings(objective="clip", clip_model=sources[1]), base, "cpu", said.append)
    assert other.trains is not None and other.trains.source == sources[1] and other.aligns is not None

    def missing() -> None:
        raise InvalidRequest("EfficientNet-Lite0 is missing.")

    monkeypatch.setattr(identity_module, "_efficientnet", missing)
    alone = resolve_scorers(settings(objective="clip"), base, "cpu", said.append)
    assert alone.knows is None and "EfficientNet-Lite0 is missing." in said and "held-out collage loss" in said[-1]
    with pytest.raises(InvalidRequest, match="without having trained"):
        resolve_scorers(settings(objective="clip", stop_on="score"), base, "cpu", said.append)
    tower = resolve_scorers(settings(), base, "cpu", said.append)
    assert tower.labels == {"aligns": "demo CLIP", "knows": "demo CLIP image tower"}


def test_pictures_are_scored_alike_every_time(base_folders: dict[str, Path], judge: Scorers, tmp_path: Path) -> None:
    task = make(base_folders["sdxl"], tmp_path, settings(scope="sample"), judge)
    assert task.pictures is not None and task.stops_on == "score"
    before, traces = torch.get_rng_state(), []
    one, two = (task.pictures.measure(task.composition, traces) for _ in range(2))
    assert one == two and set(one) == {"score", "identity", "alignment"} and torch.equal(before, torch.get_rng_state())
    assert len(traces) == 4 and gate_stats(traces)["mass_robot"] == pytest.approx(0.5)
    assert task.pictures.prompts == ["a zwx robot and a zwx alien in a kitchen",
                                     "a zwx alien and a zwx robot in a city street"]  # fmt: skip
    options = {"count": 1, "steps": 1, "size": 64, "seed": 0}
    blind = PictureScore(Scorers(None, None, judge.knows, judge.knows_by), task.base, task.pipe, task.subjects,
                         task.words, **options)  # fmt: skip
    found = blind.measure(task.composition)
    assert found["score"] == pytest.approx(found["identity"] * found["found"]) and found["found"] in (0.0, 0.5, 1.0)


def test_resumed_equals_uninterrupted_when_the_score_stops(
    base_folders: dict[str, Path], judge: Scorers, tmp_path: Path
) -> None:
    config = settings(patience=3, steps=5)
    tasks, results = [], []
    for part, stops in (("whole", None), ("parts", 2), ("parts", None)):
        tasks.append(make(base_folders["sd-v"], tmp_path, config, judge))
        control = Commands() if stops is None else StopAfter(stops)
        results.append(
            run(tasks[-1], MemorySink(), control, tmp_path / part / "c", out=tmp_path / part / "o.safetensors")
        )
    whole, resumed = tasks[0], tasks[2]
    assert same(whole.composition.state_dict(), resumed.composition.state_dict())
    assert (results[0].step, {**results[0].result, "path": 0}) == (results[2].step, {**results[2].result, "path": 0})
    one, two = whole.best, resumed.best
    assert (one.value, one.step, one.stale, one.metrics) == (two.value, two.step, two.stale, two.metrics)
    assert all(map(torch.equal, one.weights, two.weights)) and one.value == results[0].result["score"]


def test_training_ends_when_nothing_gets_better(base_folders: dict[str, Path], judge: Scorers, tmp_path: Path) -> None:
    task = make(base_folders["sd-v"], tmp_path, settings(lr=1e-8, patience=2, steps=50), judge)
    sink = MemorySink()
    outcome = run(task, sink, Commands(), tmp_path / "c", out=tmp_path / "o.safetensors")
    last = sink.of(Progress)[-1]
    assert outcome.status == "finished" and outcome.step < 10 and task.best.stale == 2
    assert {"score", "identity", "alignment", "gate_entropy", "mass_robot", "mass_alien"} <= set(last.metrics)
    recipe = task.recipe()
    assert recipe["stops_on"] == "score" and recipe["scorers"] == {"aligns": "two", "knows": "two image tower"}
    with pytest.raises(InvalidRequest, match="other models judged"):
        make(base_folders["sd-v"], tmp_path, task.config, Scorers()).load_state_dict(task.state_dict())


@pytest.mark.parametrize("objective", ["collage", "both"])
def test_a_loss_that_is_no_number_ends_with_a_sentence(
    objective: str, base_folders: dict[str, Path], sources: tuple[str, str], tmp_path: Path
) -> None:
    trains = None if objective == "collage" else AlignmentScorer(sources[0], "one")
    config = settings(objective=objective, stop_on="loss", validation=2, steps=1)
    task = make(base_folders["sd-v"], tmp_path, config, Scorers(trains))
    task.pool.latents.fill_(float("nan"))
    with pytest.raises(TrainingFailed, match="loss of step 1 is nan"):
        run(task, MemorySink(), Commands(), tmp_path / "c", out=tmp_path / "o.safetensors")


def test_best_keeps_copies_and_counts() -> None:
    weights = [torch.zeros(2)]
    best = Best(patience=2)
    for step, value in enumerate((1.0, 3.0, 3.0, float("nan"))):
        weights[0].fill_(step)
        assert not best.enough
        best.offer(value, step, weights, {"score": value})
    assert best.enough and (best.value, best.step, best.stale) == (3.0, 1, 2) and best.weights[0].tolist() == [1.0, 1.0]
    other = Best(patience=2)
    other.load_state_dict(best.state_dict())
    assert other.enough and (other.value, other.metrics) == (3.0, {"score": 3.0})
    assert not Best(patience=0, stale=9).enough


def test_gate_stats_say_who_gets_how_much() -> None:
    even = Trace(("a", "b"), {"x": [[0.5, 0.5], [0.5, 0.5]]})
    one = Trace(("a", "b"), {"x": [[2.0, 0.0]], "y": [[1.0, 0.0]]})
    assert gate_stats([even]) == {"gate_entropy": 1.0, "mass_a": 0.5, "mass_b": 0.5}
    both = gate_stats([even, one])
    assert both["mass_a"] == 0.75 and np.isclose(both["gate_entropy"], 0.5) and gate_stats([]) == {}
