"""``router``: a pool of experts and their pictures to a task that trains a router over them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from training.build.base import load_base
from training.build.experts import GateExpert
from training.build.gate import subject_pictures
from training.config import check
from training.ranks import ALONE, Ranks

if TYPE_CHECKING:
    from training.tasks.router import RouterTask
    from training.tasks.router_config import RouterTrainingConfig


def build_router(
    config: RouterTrainingConfig, experts: Sequence[GateExpert], work: Path, log: Callable[[str], None],
    ranks: Ranks = ALONE,
) -> RouterTask:  # fmt: skip
    """Load the base, find or make every expert's pictures. ``work`` keeps pictures made."""
    from mole_diffusion.experts import check_fits
    from training.tasks.gate_config import GateTrainingConfig
    from training.tasks.router import RouterTask

    config.split(len(experts))
    _check_apart([item.phrase.lower() for item in experts], "are both called")
    _check_apart([item.expert.name for item in experts], "are both named")
    base, pipe = load_base(config.base, config.precision)
    for item in experts:
        check_fits(item.expert, base)
    views = GateTrainingConfig(config.base, seed=config.seed, self_views=config.self_views)
    with ranks.first_alone():  # it makes the pictures that are missing
        subjects = [subject_pictures(item, views, base, pipe, work, log) for item in experts]
    called = [replace(item.expert, trigger=item.expert.trigger or item.phrase) for item in experts]
    return RouterTask(config, base, pipe, called, subjects, ranks)


def _check_apart(words: Sequence[str], which: str) -> None:
    word, times = Counter(words).most_common(1)[0]
    check(times == 1, f"Two experts {which} “{word}”; a pool needs each of them once, with a trigger of its own.")
