"""What a router learns from: groups of experts out of a pool, each with scenes of one to three of its subjects.

A step holds one group, so it costs what a composition of that many experts costs, however large the pool is.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mole_diffusion.bases import Base
from training.data.subjects import Subject
from training.data.views import BATCH, to_latents
from training.objectives.collage import CollageConfig, Scene, ScenePool, make_scene, subject_cutouts

CHANCES = (0.2, 0.6, 0.2)
"""Of scenes with one, two and three subjects."""
EACH = 12
"""Scenes of a group."""
_STREAM = 29


@dataclass(frozen=True)
class Group:
    """``experts``: numbers in the pool; masks of the scenes (P, E, h, w) and ``named`` (P, E) are in their order."""

    experts: tuple[int, ...]
    scenes: ScenePool
    named: Tensor


def draw_groups(pool: Sequence[int], count: int, size: int, seed: int) -> list[tuple[int, ...]]:
    """``count`` groups of ``size`` different experts; every expert of the pool comes once before any comes again."""
    rng = np.random.default_rng([seed, _STREAM])
    found: list[tuple[int, ...]] = []
    while len(found) < count:
        turn = [int(number) for number in rng.permutation(pool)]
        whole = len(turn) - len(turn) % size
        found += [tuple(turn[at : at + size]) for at in range(0, whole, size)]
        rest = turn[whole:]
        if rest:
            others = [number for number in turn if number not in rest]
            found.append((*rest, *(int(n) for n in rng.permutation(others)[: size - len(rest)])))
    return found[:count]


def make_group(
    pipe: Any, base: Base, subjects: Sequence[Subject], experts: tuple[int, ...], count: int, seed: int, *,
    size: int, chances: Sequence[float] = CHANCES,
) -> Group:  # fmt: skip
    """``count`` scenes of ``size`` pixels of a group's subjects; the same seed gives the same scenes."""
    cutouts = [subject_cutouts(subjects[number]) for number in experts]
    phrases = [subjects[number].phrase for number in experts]
    odds = np.array(chances[: len(experts)]) / sum(chances[: len(experts)])
    config = CollageConfig.of(base, single=0)
    latents, masks, named, prompts = [], [], [], []
    for start in range(0, count, BATCH):
        scenes: list[Scene] = []
        for number in range(start, min(start + BATCH, count)):
            rng = np.random.default_rng([seed, _STREAM, *experts, number])
            shown = rng.permutation(len(experts))[: 1 + int(rng.choice(len(odds), p=odds))]
            scene = make_scene([cutouts[n] for n in shown], [phrases[n] for n in shown], size, rng, config)
            whole = torch.zeros(len(experts), size, size)
            whole[torch.from_numpy(shown)] = scene.masks
            masks.append(whole)
            named.append([n in shown for n in range(len(experts))])
            prompts.append(scene.prompt)
            scenes.append(scene)
        latents.append(to_latents(pipe, base, torch.stack([scene.picture for scene in scenes])))
    stacked = torch.cat(latents)
    height, width = stacked.shape[-2:]
    cells = torch.nn.functional.adaptive_avg_pool2d(torch.stack(masks).to(stacked.device), (height, width))
    return Group(experts, ScenePool(stacked, cells, tuple(prompts)), torch.tensor(named))


def draw_present(named: Tensor, dropout: float, distractors: int, generator: torch.Generator) -> Tensor:
    """Random expert dropout (arXiv 2406.16989, section 3.3): which experts each row may use, (B, E) bool.

    Those in ``named`` stay; each other one is dropped with the chance ``dropout``, and at most ``distractors`` stay.
    """
    kept = ~named & (torch.rand(named.shape, generator=generator) >= dropout)
    order = torch.where(kept, torch.rand(named.shape, generator=generator), 2.0).argsort(1).argsort(1)
    return named | (kept & (order < distractors))
