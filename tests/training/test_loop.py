"""The loop: resume, stop, pause, commands, damaged checkpoints, early ends, losses that are no numbers, full memory."""

from __future__ import annotations

import errno
import random
from pathlib import Path

import numpy as np
import pytest
import torch

from mole_diffusion.errors import InvalidRequest
from training.checkpoint import checkpoints
from training.control import Commands
from training.errors import TrainingFailed
from training.events import Failed, Finished, LogLine, MemorySink, Progress, Sample, Saved, SinkGroup
from training.loop import Schedule, run


class Walk:
    """A linear regression whose steps draw from every global generator."""

    name = "walk"

    def __init__(self, steps: int = 12, nan_at: int = -1, enough_at: int = -1) -> None:
        self.total_steps, self.nan_at, self.enough_at, self.done = steps, nan_at, enough_at, 0
        torch.manual_seed(0)
        random.seed(0)
        np.random.seed(0)
        self.layer = torch.nn.Linear(3, 2)
        self.optimiser = torch.optim.AdamW(self.layer.parameters(), lr=0.05)

    def step(self, index: int) -> dict[str, float]:
        x = torch.randn(4, 3) + random.random() + float(np.random.rand())
        loss = self.layer(x).square().mean() * (float("nan") if index == self.nan_at else 1.0)
        self.optimiser.zero_grad()
        loss.backward()
        self.optimiser.step()
        self.done += 1
        return {"loss": loss.item(), "extra": 1.0}

    def enough(self) -> bool:
        return self.done == self.enough_at

    def state_dict(self) -> dict:
        return {"layer": self.layer.state_dict(), "optimiser": self.optimiser.state_dict(), "done": self.done}

    def load_state_dict(self, state: dict) -> None:
        self.done = state["done"]
        self.layer.load_state_dict(state["layer"])
        self.optimiser.load_state_dict(state["optimiser"])

    def sample(self, step: int, folder: Path) -> list[Sample]:
        torch.randn(7)  # disturbs the generator: the loop must undo it
        path = folder / f"{step}.txt"
        path.write_text("picture")
        return [Sample(str(path), step)]

    def finish(self, out: Path) -> dict:
        out.write_text("done")
        return {"path": str(out)}


class StopAfter(Commands):
    def __init__(self, polls: int) -> None:
        super().__init__()
        self.polls = polls

    def should_stop(self) -> bool:
        self.polls -= 1
        return self.polls < 0


def train(task: Walk, folder: Path, control: Commands | None = None, **options: object):
    sink = MemorySink()
    outcome = run(task, sink, control or Commands(), folder / "checkpoints", out=folder / "out", **options)
    return outcome, sink


def test_run_reports_every_step_and_finishes(tmp_path: Path) -> None:
    outcome, sink = train(Walk(), tmp_path)
    assert outcome.status == "finished" and outcome.step == 12
    assert [event.step for event in sink.of(Progress)] == list(range(1, 13))
    assert sink.of(Progress)[0].metrics == {"extra": 1.0}
    assert sink.of(Finished)[0].result == {"path": str(tmp_path / "out")}


@pytest.mark.parametrize("stop_at", [0, 1, 5, 11])
def test_stopped_and_resumed_equals_uninterrupted(tmp_path: Path, stop_at: int) -> None:
    whole = Walk()
    train(whole, tmp_path / "whole", schedule=Schedule(save_every=4))
    outcome, _ = train(Walk(), tmp_path / "parts", StopAfter(stop_at))
    assert outcome.status == "stopped" and outcome.step == stop_at
    resumed = Walk()
    torch.randn(100)
    random.random()
    outcome, sink = train(resumed, tmp_path / "parts", schedule=Schedule(save_every=3, sample_every=2))
    assert outcome.status == "finished"
    assert len(sink.of(Progress)) == 12 - stop_at
    assert torch.equal(whole.layer.weight, resumed.layer.weight)
    assert torch.equal(whole.layer.bias, resumed.layer.bias)


def test_damaged_newest_checkpoint_falls_back_to_the_one_before(tmp_path: Path) -> None:
    whole = Walk()
    train(whole, tmp_path / "whole")
    train(Walk(), tmp_path / "parts", StopAfter(9), schedule=Schedule(save_every=4))
    newest = checkpoints(tmp_path / "parts" / "checkpoints")[-1] / "state.safetensors"
    newest.write_bytes(newest.read_bytes()[:-7] + b"garbage")
    resumed = Walk()
    _, sink = train(resumed, tmp_path / "parts")
    assert any("damaged" in line.text for line in sink.of(LogLine))
    assert sink.of(Progress)[0].step == 9  # the checkpoint of step 8 was used
    assert torch.equal(whole.layer.weight, resumed.layer.weight)


def test_new_run_forgets_the_checkpoints_of_an_older_one(tmp_path: Path) -> None:
    train(Walk(), tmp_path, StopAfter(9))
    outcome, sink = train(Walk(), tmp_path, StopAfter(3), resume=False)
    assert outcome.step == 3 and sink.of(Progress)[0].step == 1
    _, sink = train(Walk(), tmp_path)
    assert sink.of(Progress)[0].step == 4


def test_loss_that_is_no_number_fails_with_a_sentence(tmp_path: Path) -> None:
    sink = MemorySink()
    with pytest.raises(TrainingFailed, match="lower learning rate"):
        run(Walk(nan_at=5), sink, Commands(), tmp_path / "c", out=tmp_path / "out", schedule=Schedule(save_every=2))
    assert "step 6" in sink.of(Failed)[0].reason
    assert [event.step for event in sink.of(Saved)] == [2, 4]
    assert not (tmp_path / "out").exists()


def test_commands_save_and_sample_once(tmp_path: Path) -> None:
    control = Commands()
    control.save = control.sample = True
    _, sink = train(Walk(), tmp_path, control, schedule=Schedule(save_every=0))
    assert [event.step for event in sink.of(Saved)] == [1, 12]
    assert [event.step for event in sink.of(Sample)] == [1]
    assert (tmp_path / "samples" / "1.txt").is_file()


def test_samples_at_start_end_and_between(tmp_path: Path) -> None:
    _, sink = train(Walk(), tmp_path, schedule=Schedule(sample_every=5))
    assert [event.step for event in sink.of(Sample)] == [0, 5, 10, 12]


def test_paused_run_ends_with_a_checkpoint_and_goes_on(tmp_path: Path) -> None:
    whole, control = Walk(), Commands()
    train(whole, tmp_path / "whole")
    control.pause = True
    outcome, sink = train(Walk(), tmp_path / "parts", control)
    assert (outcome.status, outcome.step) == ("paused", 0) and [event.step for event in sink.of(Saved)] == [0]
    control.pause, control.stop = True, True
    outcome, sink = train(Walk(), tmp_path / "parts", control)
    assert outcome.status == "stopped"  # who cancels does not want it to go on
    resumed = Walk()
    outcome, _ = train(resumed, tmp_path / "parts")
    assert outcome.status == "finished" and torch.equal(whole.layer.weight, resumed.layer.weight)


def test_ends_early_where_the_task_has_enough(tmp_path: Path) -> None:
    outcome, sink = train(Walk(enough_at=5), tmp_path, schedule=Schedule(sample_every=3))
    assert (outcome.status, outcome.step) == ("finished", 5)
    assert [event.step for event in sink.of(Sample)] == [0, 3, 5] and [event.step for event in sink.of(Saved)] == [5]
    again, sink = train(Walk(enough_at=5), tmp_path)
    assert again.step == 5 and not sink.of(Progress)  # what made it enough was in the checkpoint


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (torch.OutOfMemoryError("CUDA out of memory"), "too little memory"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), "too little memory"),
        (OSError(errno.ENOSPC, "No space left on device"), "disk is full"),
    ],
)
def test_full_memory_and_disk_are_sentences(error: Exception, words: str, tmp_path: Path) -> None:
    def fail(*_: object) -> None:
        raise error

    task, sink = Walk(steps=2), MemorySink()
    task.finish = fail  # type: ignore[method-assign,assignment]
    with pytest.raises(TrainingFailed, match=words):
        run(task, sink, Commands(), tmp_path / "c", out=tmp_path / "out")
    assert words in sink.of(Failed)[0].reason
    task = Walk(steps=2)
    task.sample = fail  # type: ignore[method-assign,assignment]
    outcome, sink = train(task, tmp_path / "pictures", schedule=Schedule(sample_every=1))
    assert outcome.status == "finished"  # a picture is no reason to lose a training
    assert all(words in line.text for line in sink.of(LogLine)) and len(sink.of(LogLine)) == 3


def test_sinks_hear_everything_in_order() -> None:
    one, two = MemorySink(), MemorySink()
    group = SinkGroup(one, two)
    group.emit(LogLine("a"))
    group.emit(Saved(1))
    assert one.events == two.events == [LogLine("a"), Saved(1)]
    SinkGroup().emit(Saved(2))  # nobody listens


def test_schedule_out_of_range() -> None:
    with pytest.raises(InvalidRequest, match="save_every is between"):
        Schedule(save_every=-1)


def test_programming_error_is_reported_and_raised(tmp_path: Path) -> None:
    task = Walk()
    task.finish = lambda out: 1 / 0  # type: ignore[method-assign]
    sink = MemorySink()
    with pytest.raises(ZeroDivisionError):
        run(task, sink, Commands(), tmp_path / "c", out=tmp_path / "out")
    assert "ZeroDivisionError" in sink.of(Failed)[0].reason
