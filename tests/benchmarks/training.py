"""What a step of training costs: gates and MoSLoRA beside a plain LoRA on the same base, at the same batch."""

from __future__ import annotations

import argparse
import copy
import gc
import itertools
import json
import os
import statistics
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from mole_diffusion import Expert, compose
from tests.benchmarks.measure import Memory, paired, quartiles
from tests.tiny import cut_out, tiny_lora
from training.build import load_base
from training.config import parse
from training.data.subjects import Subject
from training.objectives.denoise import choose_precision
from training.tasks.gate import GateTask, GateTrainingConfig
from training.tasks.subject import SubjectConfig, SubjectTask

SUBJECTS = {"robot": "#d02020", "alien": "#20a020"}
MAKERS: dict[str, Callable[[Stage], Any]] = {
    "lora": lambda stage: stage.subject(adapter="lora"),
    "moslora": lambda stage: stage.subject(adapter="moslora"),
    "gate_sample": lambda stage: stage.gate(scope="sample"),
    "gate_token": lambda stage: stage.gate(scope="token"),
}


class Stage:
    """A base, and tasks on pipelines that share its weights; experts are random: a step costs the same."""

    def __init__(self, base: str, batch: int, rank: int, folder: Path) -> None:
        self.base, self.pipe = load_base(base, None)
        self.batch, self.rank, self.folder = batch, rank, folder
        self.device: torch.device = self.pipe.unet.device
        self.precision = choose_precision(None, self.base, self.device)

    def subject(self, **options: Any) -> SubjectTask:
        settings = {**self._settings(), "token": "zwx", "class": "robot", "rank": self.rank, **options}
        return SubjectTask(parse(SubjectConfig, settings), self.base, self._twin(), self._subjects()[0])

    def gate(self, **options: Any) -> GateTask:
        """Two experts; nothing is validated, so that a step is a step."""
        config = parse(GateTrainingConfig, {**self._settings(), "validation": 0, "validate_prompts": 0, **options})
        pipe = self._twin()
        experts = [self._expert(name, seed) for seed, name in enumerate(SUBJECTS)]
        composition = compose(pipe, experts, gate=config.gate(len(experts)), base=self.base).attach()
        return GateTask(config, self.base, pipe, composition, self._subjects())

    def _settings(self) -> dict[str, Any]:
        return {"base": self.base.name, "batch": self.batch, "pool": self.batch, "precision": self.precision}

    def _subjects(self) -> list[Subject]:
        views = {name: tuple(cut_out(colour, turn=turn) for turn in (-20.0, 20.0)) for name, colour in SUBJECTS.items()}
        return [Subject(name, f"zwx {name}", cuts) for name, cuts in views.items()]

    def _expert(self, name: str, seed: int) -> Expert:
        """On the modules that a LoRA of this base trains."""
        targets = tuple(self.base.target_paths("unet"))
        file = self.folder / f"{name}.safetensors"
        metadata = {"modelspec.trigger_phrase": f"zwx {name}", "mole.class": name}
        if not file.is_file():
            tiny_lora(file, self.pipe, rank=self.rank, seed=seed, scale=0.1, targets=targets, metadata=metadata)
        return Expert.load(file)

    def _twin(self) -> Any:
        """The pipeline with modules of its own and the same weights."""
        pipe = copy.copy(self.pipe)
        for name, part in self.pipe.components.items():
            if isinstance(part, torch.nn.Module):
                shared = {id(held): held for held in (*part.parameters(), *part.buffers())}
                pipe.register_modules(**{name: copy.deepcopy(part, shared)})
        return pipe


def measure(stage: Stage, rounds: int, seed: int = 0) -> dict[str, Any]:
    """All contenders, paired.

    Returns:
        By contender: seconds (median), quartiles_s, ratio = median over rounds of its time by the LoRA's in the same
        round, peak_mb = most memory during a step on top of what the base takes (None where the system does not
        tell), loss = of its last step.
    """
    tasks, peaks, calls = {}, {}, {}
    for name, make in MAKERS.items():
        gc.collect()
        memory = Memory(stage.device)
        task, count = make(stage), itertools.count()
        call = _step(task, count)
        call()  # the optimiser's state and what torch sets up once
        peaks[name] = memory.peak(call)
        tasks[name], calls[name] = task, call
    times = paired(calls, stage.device, rounds=rounds, seed=seed)
    base = times["lora"]
    return {
        name: {
            "seconds": statistics.median(values),
            "quartiles_s": quartiles(values),
            "ratio": statistics.median(own / plain for own, plain in zip(values, base, strict=True)),
            "peak_mb": None if peaks[name] is None else peaks[name] / 1e6,
            "loss": calls[name]()["loss"],
        }
        for name, values in times.items()
    }


def _step(task: Any, count: Any) -> Callable[[], dict[str, float]]:
    return lambda: task.step(next(count))


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.training", description=__doc__)
    parser.add_argument("--base", default="demo", help="demo, sd21, sd21-base, sdxl, or a pipeline folder")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--threads", type=int, help="of the processor; default all")
    parser.add_argument("--device", help="cpu, cuda, mps; default the best there is")
    parser.add_argument("--json", action="store_true")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    args = build_parser().parse_args(arguments)
    if args.device:
        os.environ["MOLE_DEVICE"] = args.device
    with tempfile.TemporaryDirectory() as folder:
        stage = Stage(args.base, args.batch, args.rank, Path(folder))
        if args.threads:
            torch.set_num_threads(args.threads)
        rows = measure(stage, args.rounds)
    setting = {
        "base": stage.base.name, "device": str(stage.device), "threads": torch.get_num_threads(), "batch": args.batch,
        "rank": args.rank, "rounds": args.rounds, "precision": stage.precision, "torch": torch.__version__,
    }  # fmt: skip
    if args.json:
        sys.stdout.write(json.dumps({**setting, "rows": rows}) + "\n")
        return 0
    sys.stdout.write(", ".join(f"{name} {value}" for name, value in setting.items()) + "\n")
    for name, row in rows.items():
        memory = "" if row["peak_mb"] is None else f"  {row['peak_mb']:8.1f} MB"
        sys.stdout.write(f"{name:12s} {row['seconds']:8.4f} s  {row['ratio']:5.2f}x{memory}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
