"""The recorded weights of a run; bounded, and without touching any graph."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from mole_diffusion.functional import resample, to_maps

MAX_STEPS = 1024
MAX_MAPS = 64
MAX_SIDE = 16


@dataclass(frozen=True)
class Trace:
    """Weights of the gated experts, gain included.

    Attributes:
        names: expert names, in the order of the last dimension.
        weights: block → one list of N numbers per recorded step, averaged over the conditional rows and all places;
            text-token gates are listed as "<block>:text".
        maps: block → one (N, h, w) fp16 tensor per recorded map step, at most 16×16, averaged over rows; token scope.
        map_steps: the steps that the maps belong to; every second one is dropped each time 64 are full.
        steps: number of UNet calls since the prompts were announced.
    """

    names: tuple[str, ...]
    weights: Mapping[str, list[list[float]]] = field(default_factory=dict)
    maps: Mapping[str, list[Tensor]] = field(default_factory=dict)
    map_steps: tuple[int, ...] = ()
    steps: int = 0


class Recorder:
    """Collects means and maps of the UNet calls."""

    def __init__(self) -> None:
        self.enabled = True
        self.reset()

    def reset(self) -> None:
        """Start a new run."""
        self.steps = 0
        self._stride = 1
        self._means: dict[str, list[Tensor]] = {}
        self._maps: dict[str, dict[int, Tensor]] = {}

    @torch.no_grad()
    def add(self, weights: Mapping[str, tuple[Tensor, tuple[int, int]]]) -> None:
        """One UNet call: block → weights (B, L, N) and their grid."""
        if not self.enabled:
            return
        step, self.steps = self.steps, self.steps + 1
        keep_map = step % self._stride == 0
        for block, (value, grid) in weights.items():
            value = value.detach()
            means = self._means.setdefault(block, [])
            if len(means) < MAX_STEPS:
                means.append(value.mean((0, 1)))
            if keep_map and value.shape[1] > 1 and grid[0] > 1:
                self._maps.setdefault(block, {})[step] = _small(value, grid)
        self._thin()

    def trace(self, names: tuple[str, ...]) -> Trace:
        """What was recorded, on the CPU."""
        weights = {block: torch.stack(means).tolist() for block, means in self._means.items()}
        steps = sorted({step for maps in self._maps.values() for step in maps})
        maps = {block: [found[step].cpu() for step in sorted(found)] for block, found in self._maps.items()}
        return Trace(names, weights, maps, tuple(steps), self.steps)

    def _thin(self) -> None:
        if any(len(maps) > MAX_MAPS for maps in self._maps.values()):
            self._stride *= 2
            for maps in self._maps.values():
                for step in [step for step in maps if step % self._stride]:
                    del maps[step]


def _small(weights: Tensor, grid: tuple[int, int]) -> Tensor:
    height, width = (min(side, MAX_SIDE) for side in grid)
    return resample(to_maps(weights, grid), (height, width)).mean(0).half()
