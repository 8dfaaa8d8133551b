"""The sub-commands of ``python -m training``: their options, and what they run. Output goes through a sink."""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mole_diffusion.errors import InvalidRequest
from training.config import parse
from training.control import Commands
from training.events import Event, Failed, LogLine, Progress, Sample

if TYPE_CHECKING:  # torch is imported only by the commands that need it: --help and the worker are light
    from training.loop import Outcome, Task


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
            scores = ", ".join(f"{name} {value:.3f}" for name, value in event.scores.items())
            self._line(f"Step {event.step}: {event.path}{f' ({scores})' if scores else ''}")
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


def add_subject(parser: argparse.ArgumentParser) -> None:
    """Options of ``subject``."""
    parser.add_argument("--images", type=Path, required=True, help="folder of pictures of the subject")
    parser.add_argument("--token", required=True, help="new word that will call it, for instance zwx")
    parser.add_argument("--class", dest="class_name", required=True, help="what it is, for instance robot")
    parser.add_argument("--adapter", choices=["lora"], default="lora")
    parser.add_argument("--rank", type=int, help="default 16")
    parser.add_argument("--no-flip", action="store_true", help="the subject has a left and a right")
    parser.add_argument("--prior-pictures", type=int, help="pictures of the class for prior preservation; default 0")
    parser.add_argument("--snr-gamma", type=float, help="min-SNR weighting; default off")
    _add_common(parser, "default 400", "default 1e-3 for the demo base, else 1e-4")


def run_subject(args: argparse.Namespace) -> int:
    """``subject``: pictures of a subject to an expert's file."""
    from training.build import build_subject
    from training.tasks.subject import SubjectConfig

    names = ("base", "token", "adapter", "rank", "prior_pictures", "snr_gamma")
    settings = _settings(args, *names, **{"class": args.class_name}, flip=False if args.no_flip else None)
    config = parse(SubjectConfig, settings)
    return _train(args, lambda log: build_subject(config, args.images))


def add_gate(parser: argparse.ArgumentParser) -> None:
    """Options of ``gate``."""
    parser.add_argument(
        "--expert", action="append", required=True, metavar="FILE", help="LoRA file, or a demo expert's name; repeat"
    )
    parser.add_argument(
        "--views", action="append", default=[], metavar="DIR",
        help="pictures of the expert at the same position; without, an expert makes its own",
    )  # fmt: skip
    parser.add_argument("--method", choices=["learned", "static"], default="learned")
    parser.add_argument("--scope", choices=["sample", "token"], default="sample")
    parser.add_argument("--scale", choices=["softmax", "null", "sigmoid"], default="softmax")
    parser.add_argument("--gain", action="store_true", help="a learned factor for each gate")
    parser.add_argument("--objective", choices=["collage"], default="collage")
    parser.add_argument("--alpha", type=float, help="weight of the balance loss; default 0.5")
    parser.add_argument("--subject-weight", type=float, help="weight of subjects beside the background; default 1")
    parser.add_argument("--pool", type=int, help="training scenes; default 192")
    parser.add_argument("--validation", type=int, help="held-out scenes; default 24, 0 = none")
    parser.add_argument("--validate-every", type=int, help="steps between validations; default 50")
    parser.add_argument("--self-views", type=int, help="pictures that an expert makes of its subject; default 12")
    _add_common(parser, "default 300", "default 2e-3 for the demo base, else 1e-5")


def run_gate(args: argparse.Namespace) -> int:
    """``gate``: experts to a composition's file."""
    from training.build import GateExpert, build_gate, find_expert, phrase_of
    from training.tasks.gate import GateTrainingConfig

    if len(args.views) > len(args.expert):
        raise InvalidRequest(f"{len(args.views)} folders of views for {len(args.expert)} experts; give one for each.")
    names = ("base", "method", "scope", "scale", "gain", "objective", "alpha", "subject_weight", "pool")
    config = parse(GateTrainingConfig, _settings(args, *names, "validation", "validate_every", "self_views"))
    experts = []
    for number, name in enumerate(args.expert):
        expert, views = find_expert(name)
        given = Path(args.views[number]) if number < len(args.views) else views
        experts.append(GateExpert(expert, phrase_of(expert), given))
    return _train(args, lambda log: build_gate(config, experts, _work(args.out), log))


def add_study(parser: argparse.ArgumentParser) -> None:
    """Options of ``study``."""
    from training import study_options

    study_options.add_arguments(parser)


def run_study(args: argparse.Namespace) -> int:
    """``study``: work on what is missing of the evidence."""
    from training.study import main

    return main(args)


def add_run_job(parser: argparse.ArgumentParser) -> None:
    """Options of ``run-job``."""
    parser.add_argument("id", help="the job's id")
    parser.add_argument("--data-dir", type=Path, required=True)


def run_job_command(args: argparse.Namespace) -> int:
    """``run-job``: what the worker starts."""
    from training.jobs.run import run_job

    return run_job(args.data_dir.resolve(), args.id)


def add_worker(parser: argparse.ArgumentParser) -> None:
    """Options of ``worker``."""
    parser.add_argument("--data-dir", type=Path, required=True)


def run_worker(args: argparse.Namespace) -> int:
    """``worker``: serve a data folder's queue until interrupted; a running job survives."""
    from training.jobs.store import JobStore
    from training.jobs.worker import Worker

    worker = Worker(JobStore.of(args.data_dir), args.data_dir)
    worker.acquire()
    signal.signal(signal.SIGTERM, lambda number, frame: worker.request_stop())
    signal.signal(signal.SIGINT, lambda number, frame: worker.request_stop())
    sys.stderr.write(f"Serving {args.data_dir}.\n")
    worker.serve()
    return 0


def _add_common(parser: argparse.ArgumentParser, steps: str, rate: str) -> None:
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
    parser.add_argument("--resume", action="store_true", help="go on from the checkpoints beside --out")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")


def _settings(args: argparse.Namespace, *names: str, **more: Any) -> dict[str, Any]:
    """The given options as settings; those left out keep their defaults."""
    common = ("steps", "batch", "lr", "seed", "resolution", "precision")
    given = {name: getattr(args, name) for name in (*names, *common)}
    return {name: value for name, value in {**given, **more}.items() if value is not None}


def _work(out: Path) -> Path:
    return out.parent / f"{out.stem}.training"


def _train(args: argparse.Namespace, build: Callable[[Callable[[str], None]], Task]) -> int:
    """Run a task on this terminal: Ctrl-C writes a checkpoint and stops, ``--resume`` goes on."""
    if args.device:
        os.environ["MOLE_DEVICE"] = args.device
    from training.loop import Schedule, run

    if args.out.suffix != ".safetensors":
        raise InvalidRequest(f"--out is a .safetensors file, not {args.out.name!r}.")
    sink, control, work = TerminalSink(), Commands(), _work(args.out)
    schedule = parse(Schedule, {"save_every": args.save_every, "sample_every": args.sample_every})
    task = build(lambda text: sink.emit(LogLine(text)))
    previous = signal.signal(signal.SIGINT, lambda number, frame: setattr(control, "stop", True))
    try:
        outcome = run(task, sink, control, work / "checkpoints", args.resume, out=args.out, schedule=schedule)
    finally:
        signal.signal(signal.SIGINT, previous)
        sink.close()
    _report(outcome, args.json)
    return 0 if outcome.status == "finished" else 130


def _report(outcome: Outcome, as_json: bool) -> None:
    if as_json:
        sys.stdout.write(json.dumps({"status": outcome.status, "step": outcome.step, **outcome.result}) + "\n")
    elif outcome.status == "finished":
        sys.stdout.write(f"Wrote {outcome.result['path']}\n")
    else:
        sys.stdout.write(f"Stopped after step {outcome.step}; --resume goes on.\n")
