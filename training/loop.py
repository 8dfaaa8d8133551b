"""The one training loop: step, report, save, sample, stop, pause, resume; in one process or in several together."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

import torch

from mole_diffusion.errors import MoleError

from .checkpoint import FULL, clear, load_latest, save_checkpoint
from .config import check_range
from .control import Control
from .errors import TrainingFailed
from .events import Failed, Finished, LogLine, Progress, Sample, Saved, Sink, SinkGroup
from .ranks import ALONE, Ranks
from .rng import preserved_rng, rng_state, set_rng_state


class Task(Protocol):
    """What is trained. Everything that a step changes is in ``state_dict``.

    Where several processes train together, each has a task of its own with the same state after every step; ``sample``
    and ``finish`` are called in the first alone.
    """

    name: str
    total_steps: int

    def step(self, index: int) -> Mapping[str, float]:
        """Do step ``index`` (0-based) and return its metrics, ``loss`` among them."""
        ...

    def enough(self) -> bool:
        """Whether training may end before ``total_steps``, because its score no longer rises."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """Trainable weights, optimiser state, own counters: nested dicts, lists, tensors and JSON values."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Inverse of :meth:`state_dict`. Raises InvalidRequest where the state is another configuration's."""
        ...

    def sample(self, step: int, folder: Path) -> Iterable[Sample]:
        """Make pictures into ``folder``; no training state may change."""
        ...

    def finish(self, out: Path) -> dict[str, Any]:
        """Write the result to ``out`` atomically and describe it in JSON values."""
        ...


@dataclass(frozen=True)
class Schedule:
    """How often the loop does more than a step. 0 = only on command, and a checkpoint at the end."""

    save_every: int = 100
    """Steps between checkpoints."""
    sample_every: int = 0
    """Steps between sample pictures; with any value but 0 there are also pictures of the start."""

    def __post_init__(self) -> None:
        check_range("save_every", self.save_every, 0, 1_000_000)
        check_range("sample_every", self.sample_every, 0, 1_000_000)


@dataclass(frozen=True)
class Outcome:
    """How a run ended, after ``step`` finished steps. Stopped and paused ones can go on from there."""

    status: Literal["finished", "stopped", "paused"]
    step: int
    result: Mapping[str, Any] = field(default_factory=dict)
    """What the task's ``finish`` returned; in the first process only."""


def run(
    task: Task,
    sink: Sink,
    control: Control,
    checkpoint_dir: Path,
    resume: bool = True,
    *,
    out: Path,
    schedule: Schedule = Schedule(),
    samples_dir: Path | None = None,
    ranks: Ranks = ALONE,
) -> Outcome:
    """Train ``task`` to its end or until told to stop or to pause; the result goes to ``out``.

    An interrupted and resumed run equals an uninterrupted one bit for bit on the CPU. Every failure is
    emitted as :class:`Failed` and raised: a MoleError as it is, so that its sentence reaches the user.

    Args:
        ranks: the processes that train together, each of which calls this. The first one writes the files, says the
            events and hears the commands; the others follow it.
    """
    samples = samples_dir if samples_dir is not None else checkpoint_dir.parent / "samples"
    told = sink if ranks.first else SinkGroup()
    loop = _Loop(task, told, control, checkpoint_dir, schedule, samples, ranks)
    try:
        return loop.run(resume, out)
    except MoleError as error:
        told.emit(Failed(str(error)))
        raise
    except Exception as error:
        sentence = _in_words(error)
        told.emit(Failed(sentence or f"Training stopped with {type(error).__name__}: {error}"))
        if sentence is None:
            raise
        raise TrainingFailed(sentence) from error


def _in_words(error: Exception) -> str | None:
    """A sentence for what can happen to anybody; None for what is a fault of the program."""
    # A processor's allocator and safetensors' writer raise errors of their own, with the system's words.
    if isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in str(error):
        return (
            "The device has too little memory for this training; choose a smaller batch, resolution or rank, or end "
            "other programs that use it. The last checkpoint stays valid."
        )
    if (isinstance(error, OSError) and error.errno in FULL) or "No space left on device" in str(error):
        return "The disk is full; free some space and start the training again, which goes on from its last checkpoint."
    return None


class _Loop:
    def __init__(
        self, task: Task, sink: Sink, control: Control, checkpoints: Path, schedule: Schedule, samples: Path,
        ranks: Ranks,
    ) -> None:  # fmt: skip
        self.task, self.sink, self.control, self.ranks = task, sink, control, ranks
        self.checkpoints, self.schedule, self.samples = checkpoints, schedule, samples
        self.saved = self.sampled = -1

    def run(self, resume: bool, out: Path) -> Outcome:
        done = self.restore(resume)
        if done == 0 and self.schedule.sample_every:
            self.sample(0)
        while done < self.task.total_steps:
            enough, stop, pause = self.told(self.task.enough, self.control.should_stop, self.control.should_pause)
            if enough:
                break
            if stop or pause:
                return self.end("stopped" if stop else "paused", done)
            self.step(done)
            done += 1
            self.obey(done)
        self.save(done)
        if self.schedule.sample_every and self.sampled != done:
            self.sample(done)
        result = self.task.finish(out) if self.ranks.first else {}
        self.ranks.wait()
        self.sink.emit(Finished(result))
        return Outcome("finished", done, result)

    def told(self, *questions: Callable[[], bool]) -> list[bool]:
        """The first process's answers, for all; the others are not even asked, for asking may consume a request."""
        return self.ranks.agree([question() if self.ranks.first else False for question in questions])

    def restore(self, resume: bool) -> int:
        if self.ranks.first and not resume:
            clear(self.checkpoints)
        step, state = self.load()
        if not state:
            return 0
        self.task.load_state_dict(state["task"])
        set_rng_state(state["rng"])
        self.saved = step
        self.sink.emit(LogLine(f"Resumed after step {step}."))
        return step

    def load(self) -> tuple[int, dict[str, Any]]:
        """The latest checkpoint; the first process looks alone, and sets damaged ones aside before the others look."""
        found = load_latest(self.checkpoints) if self.ranks.first else None
        self.ranks.wait()
        step, state, skipped = found or load_latest(self.checkpoints)
        for name in skipped:
            self.sink.emit(LogLine(f"Checkpoint {name} is damaged and was skipped."))
        if self.ranks.mean(step) != step:
            raise TrainingFailed("The processes find different checkpoints; give them one shared folder for --out.")
        return step, state

    def step(self, index: int) -> None:
        metrics = dict(self.task.step(index))
        loss = float(metrics.pop("loss"))
        if not math.isfinite(loss):
            raise TrainingFailed(
                f"The loss of step {index + 1} is {loss}, so nothing can be learned from here on; "
                "start again with a lower learning rate."
            )
        self.sink.emit(Progress(index + 1, self.task.total_steps, loss, metrics))

    def obey(self, done: int) -> None:
        every = self.schedule
        save, sample = self.told(self.control.take_save, self.control.take_sample)
        if save or (every.save_every and done % every.save_every == 0):
            self.save(done)
        if sample or (every.sample_every and done % every.sample_every == 0):
            self.sample(done)

    def save(self, done: int) -> None:
        if self.saved == done:
            return
        if self.ranks.first:
            save_checkpoint(self.checkpoints, done, {"task": self.task.state_dict(), "rng": rng_state()})
        self.ranks.wait()
        self.saved = done
        self.sink.emit(Saved(done))

    def sample(self, done: int) -> None:
        if self.ranks.first:
            try:
                self.picture(done)
            except Exception as error:
                reason = str(error) if isinstance(error, MoleError) else _in_words(error)
                if reason is None:
                    raise
                self.sink.emit(LogLine(f"No sample picture after step {done}, and training goes on: {reason}"))
        self.ranks.wait()
        self.sampled = done

    def picture(self, done: int) -> None:
        self.samples.mkdir(parents=True, exist_ok=True)
        with preserved_rng():
            for sample in self.task.sample(done, self.samples):
                self.sink.emit(sample)

    def end(self, status: Literal["stopped", "paused"], done: int) -> Outcome:
        self.save(done)
        self.sink.emit(LogLine(f"{status.capitalize()} after step {done}; a checkpoint keeps it."))
        return Outcome(status, done)
