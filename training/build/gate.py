"""``gate``: experts and their pictures to a task that trains a composition."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mole_diffusion.bases import Base
from training.build.base import load_base
from training.build.experts import GateExpert
from training.config import check
from training.data.subjects import Subject, load_subject
from training.ranks import Ranks

if TYPE_CHECKING:
    from mole_diffusion import Composition
    from training.tasks.gate import GateTask, GateTrainingConfig

Log = Callable[[str], None]
ALONE = Ranks()


def build_gate(
    config: GateTrainingConfig, experts: Sequence[GateExpert], work: Path, log: Log, *,
    warm_start: Path | None = None, ranks: Ranks = ALONE,
) -> GateTask:  # fmt: skip
    """Load the base, find or make every expert's pictures, attach the composition.

    Args:
        work: keeps pictures that experts make of themselves; a folder that several trainings share saves that work.
        warm_start: a saved composition of some of these experts, whose gates these start from.
        ranks: the processes that train together.
    """
    import torch

    from mole_diffusion import compose
    from mole_diffusion.experts import check_fits
    from training.tasks.gate import GateTask
    from training.validation import resolve_scorers

    check(len(experts) >= 2, f"A gate chooses between experts: it needs at least two, not {len(experts)}.")
    phrases = [item.phrase.lower() for item in experts]
    twice = next((phrase for phrase in phrases if phrases.count(phrase) > 1), "")
    check(not twice, f"Two experts are both called “{twice}”; give them own triggers.")
    base, pipe = load_base(config.base, config.precision)
    for item in experts:
        check_fits(item.expert, base)
    scorers = resolve_scorers(config, base, pipe.unet.device, log)
    with ranks.first_alone():  # it makes the pictures that are missing
        subjects = [subject_pictures(item, config, base, pipe, work, log) for item in experts]
    called = [replace(item.expert, trigger=item.expert.trigger or item.phrase) for item in experts]
    with torch.random.fork_rng():
        torch.manual_seed(config.seed)  # the gates' hidden layers start at random
        composition = compose(pipe, called, gate=config.gate(len(called)), base=base)
    if warm_start is not None:
        _start_from(composition, warm_start, log)
    composition.attach()
    return GateTask(config, base, pipe, composition, subjects, scorers, ranks)


def _start_from(composition: Composition, path: Path, log: Log) -> None:
    from training.warm_start import warm_start

    known = warm_start(composition, path)
    composition.recipe = {"warm_start": hashlib.sha256(path.read_bytes()).hexdigest()}
    log(f"The gates of {', '.join(known)} start from {path.name}.")


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
    part = folder.with_name(f"{folder.name}.{os.getpid()}.part")  # others may share the folder and make the same
    options = {"count": config.self_views, "seed": config.seed}
    try:
        make_self_views(pipe, base, item.expert, item.phrase, part, log=log, **options)
        (part / "whole").touch()
        if not (folder / "whole").is_file():
            shutil.rmtree(folder, ignore_errors=True)
            part.rename(folder)
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return load_subject(name, item.phrase, folder)
