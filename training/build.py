"""From settings to a task that is ready to run: base, experts, pictures, composition."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mole_diffusion.bases import Base, assets_dir, choose_placement, get_base
from mole_diffusion.errors import InvalidRequest
from training.config import check
from training.data.subjects import Subject, load_subject, subject_phrase
from training.objectives.denoise import choose_precision

if TYPE_CHECKING:
    from mole_diffusion import Expert
    from training.tasks.gate import GateTask, GateTrainingConfig
    from training.tasks.subject import SubjectConfig, SubjectTask

Log = Callable[[str], None]


@dataclass(frozen=True)
class GateExpert:
    """An expert with the phrase that names its subject, and the folder of its pictures if there is one."""

    expert: Expert
    phrase: str
    views: Path | None = None


def load_base(name: str, precision: str | None) -> tuple[Base, Any]:
    """A base and its pipeline on the best device, ready to train on: (base, pipe)."""
    import torch
    from diffusers.models.attention_processor import AttnProcessor

    if torch.get_num_threads() != (os.cpu_count() or 1) and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(os.cpu_count() or 1)
    base, device = get_base(name), choose_placement(device_asked_for()).device
    chosen = choose_precision(precision, base, device)  # type: ignore[arg-type]
    half = chosen == "bfloat16" and device.type == "cuda"
    pipe = base.load(device, torch.bfloat16 if half else torch.float32)
    if device.type == "cpu":
        pipe.unet.set_attn_processor(AttnProcessor())  # the fused attention's backward takes 40 % of a CPU step
    elif base.full_size:
        pipe.unet.enable_gradient_checkpointing()  # a third slower, and fits into consumer GPUs
    return base, pipe


def device_asked_for() -> str | None:
    """The device that the user named (the page and the commands say so in MOLE_DEVICE), None for the best one."""
    name = os.environ.get("MOLE_DEVICE", "")
    return None if name in ("", "auto") else name


def build_subject(config: SubjectConfig, images: Path) -> SubjectTask:
    """Read the pictures, load the base, attach the adapter."""
    from training.tasks.subject import SubjectTask

    subject = load_subject(config.name or config.token, config.phrase, images)
    base, pipe = load_base(config.base, config.precision)
    return SubjectTask(config, base, pipe, subject)


def build_gate(config: GateTrainingConfig, experts: Sequence[GateExpert], work: Path, log: Log) -> GateTask:
    """Load the base, find or make every expert's pictures, attach the composition. ``work`` keeps pictures made."""
    import torch

    from mole_diffusion import compose
    from mole_diffusion.experts import check_fits
    from training.tasks.gate import GateTask

    check(len(experts) >= 2, f"A gate chooses between experts: it needs at least two, not {len(experts)}.")
    phrases = [item.phrase.lower() for item in experts]
    twice = next((phrase for phrase in phrases if phrases.count(phrase) > 1), "")
    check(not twice, f"Two experts are both called “{twice}”; give them own triggers.")
    base, pipe = load_base(config.base, config.precision)
    for item in experts:
        check_fits(item.expert, base)
    subjects = [_subject(item, config, base, pipe, work, log) for item in experts]
    called = [replace(item.expert, trigger=item.expert.trigger or item.phrase) for item in experts]
    with torch.random.fork_rng():
        torch.manual_seed(config.seed)  # the gates' hidden layers start at random
        composition = compose(pipe, called, gate=config.gate(len(called)), base=base)
    composition.attach()
    return GateTask(config, base, pipe, composition, subjects)


def _subject(item: GateExpert, config: GateTrainingConfig, base: Base, pipe: Any, work: Path, log: Log) -> Subject:
    """The expert's pictures: the user's if one has a mask, else those it made before, else new ones of its own."""
    from training.data.self_views import make_self_views

    name = item.expert.name
    if item.views is not None:
        subject = load_subject(name, item.phrase, item.views)
        if subject.cutouts:
            return subject
        log(f"The pictures of {name} have no transparent background, so the expert makes its own.")
    made_from = f"{item.expert.sha256}|{item.phrase}|{base.name}|{config.seed}|{config.self_views}"
    folder = work / f"views-{hashlib.sha256(made_from.encode()).hexdigest()[:12]}"
    if (folder / "whole").is_file():
        return load_subject(name, item.phrase, folder)
    log(f"{name} makes {config.self_views} pictures of its subject.")
    options = {"count": config.self_views, "seed": config.seed}
    make_self_views(pipe, base, item.expert, item.phrase, folder, log=log, **options)
    (folder / "whole").touch()
    return load_subject(name, item.phrase, folder)


def find_expert(name: str) -> tuple[Expert, Path | None]:
    """An expert by file, or a demo expert by name, with the demo's pictures of it where they exist."""
    from mole_diffusion import Expert

    path = Path(name)
    if not path.is_file():
        demo = assets_dir() / "demo" / "experts" / f"{name}.safetensors"
        if Path(name).name != name or not demo.is_file():
            raise InvalidRequest(f"{name} is neither a file nor a demo expert.")
        path = demo
    expert = Expert.load(path)
    views = assets_dir() / "demo" / "subjects" / path.stem / "train"
    return expert, views if path.parent == assets_dir() / "demo" / "experts" and views.is_dir() else None


def phrase_of(expert: Expert, trigger: str | None = None, class_name: str | None = None) -> str:
    """What calls an expert's subject: the given words, else those of its file."""
    return subject_phrase(trigger or expert.trigger, class_name or expert.metadata.get("mole.class"))
