"""How good is the demo base: the judge's figures for generated pictures beside ceiling and floor on real scenes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from training.base.judge import Judge
from training.base.scenes import BACKGROUNDS, caption_of, compose_scene, is_withheld_pair

Draw = Callable[[list[str], list[int]], np.ndarray]
"""(prompts, seeds) -> (B, H, W, 3) uint8."""


@dataclass(frozen=True)
class Case:
    """A prompt of the protocol: its things (left to right), ground and words."""

    names: tuple[str, ...]
    background: str

    @property
    def prompt(self) -> str:
        return caption_of(self.names, self.background, "left of" if len(self.names) == 2 else None)


def protocol(names: list[str], seed: int = 31, pairs: int = 100) -> tuple[list[Case], list[Case]]:
    """Two single-thing cases per name, and ``pairs`` cases of pairs that no training scene holds."""
    rng = np.random.default_rng(seed)
    singles = [Case((name,), str(rng.choice(BACKGROUNDS))) for name in names for _ in range(2)]
    singles = [singles[i] for i in rng.permutation(len(singles))]
    withheld = [(a, b) for i, a in enumerate(names) for b in names[i + 1 :] if is_withheld_pair(a, b)]
    chosen = [withheld[i] for i in rng.choice(len(withheld), min(pairs, len(withheld)), replace=False)]
    ordered = [pair if rng.random() < 0.5 else pair[::-1] for pair in chosen]
    return singles, [Case(pair, str(rng.choice(BACKGROUNDS))) for pair in ordered]


def real_scenes(cases: list[Case], things: Mapping[str, np.ndarray], size: int, seed: int = 97) -> np.ndarray:
    """Composed scenes of the cases: the ceiling."""
    rng = np.random.default_rng(seed)
    relation = "left of"
    return np.stack([
        compose_scene(things, case.names, case.background, size, rng,
                      relation=relation if len(case.names) == 2 else None).image for case in cases
    ])  # fmt: skip


def measure(judge: Judge, cases: list[Case], pictures: np.ndarray, real: np.ndarray) -> dict[str, float]:
    """Rate with its 95 % interval, ceiling on ``real``, floor on ``real`` under shuffled captions, share of the way.

    A hit: a single thing ranks first among all names; of a pair, both are in the top 5 of their halves.
    """
    rng, things = np.random.default_rng(5), len(cases[0].names)
    top = 1 if things == 1 else 5

    def hits(ranks: tuple[Tensor, ...], order: np.ndarray) -> np.ndarray:
        return judge.hits(ranks, [[cases[i].names[strip] for i in order] for strip in range(things)], top)

    own = np.arange(len(cases))
    seen = judge.look(real, things)
    found = hits(judge.look(pictures, things), own)
    ceiling = float(hits(seen, own).mean())
    floor = float(np.mean([hits(seen, rng.permutation(own)).mean() for _ in range(20)]))
    means = found[rng.integers(len(found), size=(2000, len(found)))].mean(1)
    share = (float(found.mean()) - floor) / (ceiling - floor)
    return {
        "rate": float(found.mean()), "low": float(np.quantile(means, 0.025)), "high": float(np.quantile(means, 0.975)),
        "ceiling": ceiling, "floor": floor, "share": share, "cases": float(len(cases)),
    }  # fmt: skip
