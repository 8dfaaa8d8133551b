"""Stopped and resumed equals never stopped, bit for bit: every tensor of the state, and the file, of every task.

A row of the table is one line: what makes the task. Dropout is on, so that random state counts as well.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from mole_diffusion import Expert, compose
from mole_diffusion.scoring import AlignmentScorer, ClipIdentity
from tests.tiny import tiny_clip
from tests.training.helpers import load, lora, subject
from tests.training.test_router import COLOURS as POOL
from tests.training.test_router import config as router_config
from tests.training.test_router import subjects as router_subjects
from training.checkpoint import pack
from training.config import parse
from training.control import Commands
from training.events import MemorySink, Progress
from training.loop import Schedule, run
from training.tasks.gate import GateTask, GateTrainingConfig
from training.tasks.router import RouterTask
from training.tasks.subject import SubjectConfig, SubjectTask
from training.validation import Scorers

STEPS, STOP = 3, 2
NAMES = ("robot", "alien")


def subject_task(base_folder: Path, folder: Path, **options: Any) -> SubjectTask:
    values = {"base": str(base_folder), "token": "zwx", "class": "robot", "batch": 1, "pool": 4, "rank": 2, "lr": 1e-2}
    base, pipe = load(base_folder)
    return SubjectTask(parse(SubjectConfig, {**values, "steps": STEPS, **options}), base, pipe, subject("robot"))


def gate_task(base_folder: Path, folder: Path, **options: Any) -> GateTask:
    values = {"base": str(base_folder), "batch": 1, "pool": 4, "validation": 2, "validate_every": 1, "lr": 1e-2,
              "validate_prompts": 0}  # fmt: skip
    config = parse(GateTrainingConfig, {**values, "steps": STEPS, **options})
    base, pipe = load(base_folder)
    experts = experts_in(folder, pipe, NAMES)
    torch.manual_seed(0)
    composition = compose(pipe, experts, gate=config.gate(2), base=base).attach()
    return GateTask(config, base, pipe, composition, [subject(name) for name in NAMES], scorers(config, folder))


def router_task(base_folder: Path, folder: Path, **options: Any) -> RouterTask:
    base, pipe = load(base_folder)
    settings = router_config(**{"steps": STEPS, **options})
    return RouterTask(settings, base, pipe, experts_in(folder, pipe, tuple(POOL)), router_subjects())


def experts_in(folder: Path, pipe: Any, names: Sequence[str]) -> list[Expert]:
    """The folder's experts; those that are there stay, for written anew they would have other hashes."""
    files = [folder / f"{name}.safetensors" for name in names]
    for seed, (file, name) in enumerate(zip(files, names, strict=True)):
        if not file.is_file():
            lora(folder, pipe, name, seed=seed)
    return [Expert.load(file) for file in files]


def scorers(config: GateTrainingConfig, folder: Path) -> Scorers:
    """One tiny model trains and another judges, where the settings ask for them."""
    one, two = (AlignmentScorer(f"local-dir:{tiny_clip(folder / f'clip{s}', seed=s)}", f"clip{s}") for s in (0, 1))
    judged = config.validate_prompts > 0
    trains = None if config.objective == "collage" else one
    return Scorers(trains, two, ClipIdentity(two), two.source) if judged else Scorers(trains)


Maker = Callable[..., Any]
CLIP = {"objective": "clip", "clip_side": 32}
SCORE = {"validate_prompts": 1, "validate_picture_steps": 2, "patience": 2, "lr": 0.5}
TASKS: dict[str, tuple[Maker, str, dict[str, Any]]] = {
    "subject-lora-prior": (subject_task, "sd-v", {"prior_pictures": 1, "snr_gamma": 5.0}),
    "subject-moslora-accumulate": (subject_task, "sd-v", {"adapter": "moslora", "accumulate": 2}),
    "subject-text-encoders": (subject_task, "sdxl", {"train_text_encoders": True}),
    "gate-sample": (gate_task, "sd-v", {"scope": "sample", "prompt_dropout": 0.3}),
    "gate-token": (gate_task, "sd-v", {"scope": "token", "scale": "null", "gain": True}),
    "gate-static": (gate_task, "sd-v", {"method": "static"}),
    "gate-clip": (gate_task, "sd-v", CLIP),
    "gate-both-score": (gate_task, "sd-v", {**CLIP, **SCORE, "objective": "both"}),
    "router": (router_task, "sd-v", {}),
}  # fmt: skip


def with_dropout(task: Any) -> Any:
    for module in task.pipe.unet.modules():
        if type(module) is torch.nn.Dropout:
            module.p = 0.1
    return task


def train(task: Any, folder: Path) -> tuple[Any, list[tuple[int, float]]]:
    sink = MemorySink()
    out, schedule = folder / "out.safetensors", Schedule(save_every=STOP)
    run(task, sink, Commands(), folder / "checkpoints", out=out, schedule=schedule)
    return task, [(event.step, event.loss) for event in sink.of(Progress)]


def frozen(task: Any) -> tuple[Any, dict[str, torch.Tensor]]:
    tensors: dict[str, torch.Tensor] = {}
    return pack(task.state_dict(), tensors), tensors


def content(path: Path) -> tuple[dict[str, str], dict[str, torch.Tensor]]:
    with safe_open(path, "pt") as file:
        return file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - it is no dict


def equal(one: dict[str, torch.Tensor], two: dict[str, torch.Tensor]) -> bool:
    """Bit for bit, NaN too, and the same kinds of numbers."""
    same = one.keys() == two.keys() and all(one[key].dtype == two[key].dtype for key in one)
    return same and all(one[key].numpy(force=True).tobytes() == two[key].numpy(force=True).tobytes() for key in one)


@pytest.mark.parametrize("name", TASKS)
def test_resumed_equals_uninterrupted(name: str, base_folders: dict[str, Path], tmp_path: Path) -> None:
    maker, kind, options = TASKS[name]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    task = with_dropout(maker(base_folders[kind], tmp_path, **options))
    torch.manual_seed(5)
    task, losses = train(task, whole)
    # All that is left of a run that was killed after step STOP: its checkpoint, in a process that drew other numbers.
    left = f"checkpoints/step-{STOP:08d}"
    shutil.copytree(whole / left, parts / left)
    resumed = with_dropout(maker(base_folders[kind], tmp_path, **options))
    torch.manual_seed(99)
    resumed, rest = train(resumed, parts)
    assert len(losses) == STEPS and losses[STOP:] == rest
    (values, tensors), (others, resumed_tensors) = frozen(task), frozen(resumed)
    assert values == others
    assert equal(tensors, resumed_tensors)
    (notes, written), (resumed_notes, again) = (content(folder / "out.safetensors") for folder in (whole, parts))
    assert notes == resumed_notes and equal(written, again)


def test_dropout_makes_random_state_count(base_folders: dict[str, Path], tmp_path: Path) -> None:
    """Without the saved state the table would fail: another seed gives another loss."""
    losses = []
    for seed in (1, 1, 2):
        task = with_dropout(subject_task(base_folders["sd-v"], tmp_path))
        torch.manual_seed(seed)
        losses.append(task.step(0)["loss"])
    assert losses[0] == losses[1] != losses[2]
