"""``gate``: experts and their pictures to a task that trains a composition."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mole_diffusion.bases import Base
from training.build.base import load_base
from training.build.experts import GateExpert
from training.config import check
from training.data.subjects import Subject, load_subject

if TYPE_CHECKING:
    from training.tasks.gate import GateTask, GateTrainingConfig

Log = Callable[[str], None]


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
    subjects = [subject_pictures(item, config, base, pipe, work, log) for item in experts]
    called = [replace(item.expert, trigger=item.expert.trigger or item.phrase) for item in experts]
    with torch.random.fork_rng():
        torch.manual_seed(config.seed)  # the gates' hidden layers start at random
        composition = compose(pipe, called, gate=config.gate(len(called)), base=base)
    composition.attach()
    return GateTask(config, base, pipe, composition, subjects)


def subject_pictures(
    item: GateExpert, config: GateTrainingConfig, base: Base, pipe: Any, work: Path, log: Log
) -> Subject:
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
