"""The one training loop: step, report, save, sample, stop, resume."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

from mole_diffusion.errors import MoleError

from .checkpoint import clear, load_latest, save_checkpoint
from .config import check_range
from .control import Control
from .errors import TrainingFailed
from .events import Failed, Finished, LogLine, Progress, Sample, Saved, Sink
from .rng import preserved_rng, rng_state, set_rng_state


class Task(Protocol):
    """What is trained. Everything that a step changes is in ``state_dict``."""

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
    """How a run ended, after ``step`` finished steps."""

    status: Literal["finished", "stopped"]
    step: int
    result: Mapping[str, Any] = field(default_factory=dict)


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
) -> Outcome:
    """Train ``task`` to its end or until told to stop; the result goes to ``out``.

    An interrupted and resumed run equals an uninterrupted one bit for bit on the CPU. Every failure is
    emitted as :class:`Failed` and raised: a MoleError as it is, so that its sentence reaches the user.
    """
    samples = samples_dir if samples_dir is not None else checkpoint_dir.parent / "samples"
    loop = _Loop(task, sink, control, checkpoint_dir, schedule, samples)
    try:
        return loop.run(resume, out)
    except MoleError as error:
        sink.emit(Failed(str(error)))
        raise
    except Exception as error:
        sink.emit(Failed(f"Training stopped with {type(error).__name__}: {error}"))
        raise


class _Loop:
    def __init__(
        self, task: Task, sink: Sink, control: Control, checkpoints: Path, schedule: Schedule, samples: Path
    ) -> None:
        self.task, self.sink, self.control = task, sink, control
        self.checkpoints, self.schedule, self.samples = checkpoints, schedule, samples
        self.saved = -1

    def run(self, resume: bool, out: Path) -> Outcome:
        if not resume:
            clear(self.checkpoints)
        done = self.restore()
        if done == 0 and self.schedule.sample_every:
            self.sample(0)
        while done < self.task.total_steps and not self.task.enough():
            if self.control.should_stop():
                return self.stop(done)
            self.step(done)
            done += 1
            self.obey(done)
        self.save(done)
        result = self.task.finish(out)
        self.sink.emit(Finished(result))
        return Outcome("finished", done, result)

    def restore(self) -> int:
        step, state, skipped = load_latest(self.checkpoints)
        for name in skipped:
            self.sink.emit(LogLine(f"Checkpoint {name} is damaged and was skipped."))
        if not state:
            return 0
        self.task.load_state_dict(state["task"])
        set_rng_state(state["rng"])
        self.saved = step
        self.sink.emit(LogLine(f"Resumed after step {step}."))
        return step

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
        if self.control.take_save() or (every.save_every and done % every.save_every == 0):
            self.save(done)
        last = done == self.task.total_steps
        if self.control.take_sample() or (every.sample_every and (last or done % every.sample_every == 0)):
            self.sample(done)

    def save(self, done: int) -> None:
        if self.saved == done:
            return
        save_checkpoint(self.checkpoints, done, {"task": self.task.state_dict(), "rng": rng_state()})
        self.saved = done
        self.sink.emit(Saved(done))

    def sample(self, done: int) -> None:
        self.samples.mkdir(parents=True, exist_ok=True)
        with preserved_rng():
            for sample in self.task.sample(done, self.samples):
                self.sink.emit(sample)

    def stop(self, done: int) -> Outcome:
        self.save(done)
        self.sink.emit(LogLine(f"Stopped after step {done}; a checkpoint keeps it."))
        return Outcome("stopped", done)
