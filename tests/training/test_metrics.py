"""Trackers: real TensorBoard files hold losses and scores; what is not installed is named in a sentence."""

from __future__ import annotations

from pathlib import Path

import pytest

from mole_diffusion.errors import InvalidRequest
from tests.training.test_loop import Walk
from training.control import Commands
from training.events import MemorySink, Progress, Sample, SinkGroup
from training.loop import run
from training.metrics import open_tracker


def curves(folder: Path) -> dict[str, list[tuple[int, float]]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (file,) = folder.rglob("events.out.tfevents.*")
    read = EventAccumulator(str(file))
    read.Reload()
    return {name: [(item.step, item.value) for item in read.Scalars(name)] for name in read.Tags()["scalars"]}


def test_tensorboard_holds_losses_and_scores(tmp_path: Path) -> None:
    memory, tracker = MemorySink(), open_tracker("tensorboard", "robot", tmp_path / "logs")
    tracker.emit(Sample("a.png", 0, {"prompt": 0.25}, "a robot", {"robot": 0.5}))
    tracker.emit(Sample("b.png", 1))  # nobody scored it: no point on a curve
    sink = SinkGroup(memory, tracker)
    run(Walk(steps=3), sink, Commands(), tmp_path / "c", out=tmp_path / "out")
    tracker.close()
    found = curves(tmp_path / "logs" / "robot")
    assert found.pop("alignment/prompt") == [(0, 0.25)] and found.pop("identity/robot") == [(0, 0.5)]
    assert found.pop("extra") == [(1, 1.0), (2, 1.0), (3, 1.0)]
    assert found.pop("loss") == [(event.step, pytest.approx(event.loss)) for event in memory.of(Progress)]
    assert not found


def test_missing_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("accelerate.utils.is_wandb_available", lambda: False)
    with pytest.raises(InvalidRequest, match="Weights & Biases is not installed: pip install wandb"):
        open_tracker("wandb", "robot", tmp_path)
    assert not list(tmp_path.iterdir())
