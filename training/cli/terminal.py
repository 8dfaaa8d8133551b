"""A task on this terminal: its progress, Ctrl-C, ``--resume``, the result; and the options all tasks share."""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mole_diffusion.errors import InvalidRequest
from training.config import parse
from training.control import Commands
from training.events import Event, Failed, LogLine, Progress, Sample, Sink, SinkGroup

if TYPE_CHECKING:  # torch is imported only by the commands that need it: --help and the worker are light
    from training.loop import Outcome, Task
    from training.metrics import TrackerSink
    from training.ranks import Ranks


class TerminalSink:
    """A progress bar on a terminal, plain lines elsewhere; everything goes to standard error."""

    def __init__(self) -> None:
        self._bar: Any = None

    def emit(self, event: Event) -> None:
        """Show one event."""
        if isinstance(event, Progress):
            self._progress(event)
        elif isinstance(event, LogLine):
            self._line(event.text)
        elif isinstance(event, Sample):
            self._line(f"Step {event.step}: {event.path}{_scores(event)}")
        elif isinstance(event, Failed):
            self.close()

    def close(self) -> None:
        """End the bar."""
        if self._bar is not None:
            self._bar.close()

    def _progress(self, event: Progress) -> None:
        from tqdm import tqdm

        if self._bar is None:
            self._bar = tqdm(total=event.total, initial=event.step - 1, disable=not sys.stderr.isatty(), unit="step")
        self._bar.update(1)
        self._bar.set_postfix(loss=f"{event.loss:.4f}", refresh=False)
        every = max(event.total // 10, 1)
        if not sys.stderr.isatty() and event.step % every == 0:
            extra = "".join(f" {name} {value:.4f}" for name, value in event.metrics.items())
            self._line(f"step {event.step}/{event.total} loss {event.loss:.4f}{extra}")

    def _line(self, text: str) -> None:
        if self._bar is not None:
            self._bar.clear()
        sys.stderr.write(f"{text}\n")


def _scores(sample: Sample) -> str:
    """ " (alignment: prompt 0.301, robot 0.285; identity: robot 0.712; by demo CLIP, EfficientNet-Lite0)"."""
    kinds = {"alignment": sample.scores, "identity": sample.identity}
    parts = [
        f"{kind}: " + ", ".join(f"{name} {value:.3f}" for name, value in scores.items())
        for kind, scores in kinds.items()
        if scores
    ]
    return f" ({'; '.join([*parts, 'by ' + ', '.join(sample.scorers)])})" if parts else ""


def add_common(parser: argparse.ArgumentParser, steps: str, rate: str) -> None:
    parser.add_argument("--base", default="demo", help="demo, sd21, sd21-base, sdxl, or a pipeline folder")
    parser.add_argument("--out", type=Path, required=True, help="file to write, .safetensors")
    parser.add_argument("--steps", type=int, help=steps)
    parser.add_argument("--batch", type=int, help="default by base")
    parser.add_argument("--lr", type=float, help=rate)
    parser.add_argument("--seed", type=int, help="default 0")
    parser.add_argument("--resolution", type=int, help="side of the pictures in pixels; default the base's")
    parser.add_argument("--precision", choices=["float32", "bfloat16"], help="default by base and device")
    parser.add_argument("--device", help="cpu, cuda, cuda:1, mps; default the best there is")
    parser.add_argument("--sample-every", type=int, default=0, help="steps between sample pictures; default none")
    parser.add_argument("--save-every", type=int, default=100, help="steps between checkpoints; default 100")
    parser.add_argument("--log-with", choices=["tensorboard", "wandb"], help="draw curves of loss and scores there too")
    parser.add_argument("--resume", action="store_true", help="go on from the checkpoints beside --out")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")


def given_settings(args: argparse.Namespace, *names: str, **more: Any) -> dict[str, Any]:
    """The given options as settings; those left out keep their defaults."""
    common = ("steps", "batch", "lr", "seed", "resolution", "precision")
    given = {name: getattr(args, name) for name in (*names, *common)}
    return {name: value for name, value in {**given, **more}.items() if value is not None}


def work_folder(out: Path) -> Path:
    return out.parent / f"{out.stem}.training"


def train(args: argparse.Namespace, build: Callable[[Callable[[str], None]], Task]) -> int:
    """Run a task on this terminal: Ctrl-C writes a checkpoint and stops, ``--resume`` goes on.

    Under ``accelerate launch`` or torchrun the processes train together; ``build`` then makes the task of this one
    (``Ranks.here()`` tells which) on MOLE_DEVICE, and only the first process says anything.
    """
    from training.loop import Schedule, run

    if args.out.suffix != ".safetensors":
        raise InvalidRequest(f"--out is a .safetensors file, not {args.out.name!r}.")
    ranks, control, work = _ranks(args.device), Commands(), work_folder(args.out)
    schedule = parse(Schedule, {"save_every": args.save_every, "sample_every": args.sample_every})
    terminal = TerminalSink()
    tracker = _tracker(args, work) if ranks.first else None
    sink: Sink = terminal if tracker is None else SinkGroup(terminal, tracker)
    task = build(lambda text: sink.emit(LogLine(text)) if ranks.first else None)
    try:
        with _stop_on_signals(control):
            outcome = run(
                task, sink, control, work / "checkpoints", args.resume, out=args.out, schedule=schedule, ranks=ranks
            )
    finally:
        terminal.close()
        if tracker is not None:
            tracker.close()
    ranks.close()
    if ranks.first:
        _report(outcome, args.json)
    return 0 if outcome.status == "finished" else 130


def _ranks(device: str | None) -> Ranks:
    """The processes that train together; each of several is told its device in MOLE_DEVICE."""
    from training.ranks import Ranks

    ranks = Ranks.here(device)
    if ranks.count > 1 and device not in (None, "auto", "cpu", "cuda"):
        raise InvalidRequest(f"{ranks.count} processes have a device each; leave out --device {device}, or say cpu.")
    if ranks.device or device:
        os.environ["MOLE_DEVICE"] = ranks.device or device or ""
    return ranks


def _tracker(args: argparse.Namespace, work: Path) -> TrackerSink | None:
    if args.log_with is None:
        return None
    from training.metrics import open_tracker

    return open_tracker(args.log_with, args.out.stem, work / "logs")


@contextmanager
def _stop_on_signals(control: Commands) -> Iterator[None]:
    """Ctrl-C, and SIGTERM, with which launchers and machines end a process: stop after the step that is under way."""
    numbers = (signal.SIGINT, signal.SIGTERM)
    previous = {number: signal.signal(number, lambda *_: setattr(control, "stop", True)) for number in numbers}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _report(outcome: Outcome, as_json: bool) -> None:
    if as_json:
        sys.stdout.write(json.dumps({"status": outcome.status, "step": outcome.step, **outcome.result}) + "\n")
    elif outcome.status == "finished":
        sys.stdout.write(f"Wrote {outcome.result['path']}\n")
    else:
        sys.stdout.write(f"Stopped after step {outcome.step}; --resume goes on.\n")
