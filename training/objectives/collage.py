"""The collage objective: scenes pasted together from pictures of the subjects, with captions and masks.

A scene's truth is known without a scorer: which subject is where, and what the prompt should say. Order in the
prompt, place, size, depth and background are drawn independently of each other, so that gates cannot learn
"first in the prompt = left", nor a pasted edge's halo. The demo base alone believes just that, and is left its belief.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from mole_diffusion.bases import Base
from mole_diffusion.errors import InvalidRequest
from training.base.scenes import EXTENTS, article, slots, snap
from training.data.backgrounds import random_background
from training.data.paste import Placement, fit, paste, to_tensor
from training.data.subjects import Subject
from training.data.views import BATCH, to_latents

ATTEMPTS = 12


@dataclass(frozen=True)
class CollageConfig:
    """How scenes are drawn; chances in 0…1, lengths as fractions of the picture's side."""

    single: float = 0.2
    """Chance of a scene with one subject only."""
    scales: tuple[float, float] = (0.38, 0.62)
    """Longer side of a subject in a scene of two; more subjects are smaller."""
    relation: float = 0.25
    """Chance that a caption of two says who is left of whom; otherwise the order says nothing about places."""
    min_visible: float = 0.55
    """Of a subject's area, whatever covers it or cuts it off."""
    flip: bool = True
    """Mirror half of the cut-outs."""
    on_slots: bool = False
    """Subjects stand where things of the demo world stand, in the order of the prompt, which is all its base knows."""

    @classmethod
    def of(cls, base: Base, **changes: Any) -> CollageConfig:
        """The defaults for a base: the demo base has seen few places and sizes, one order, and nothing mirrored."""
        if base.on_slots:
            changes = {"on_slots": True, "flip": False, **changes}
        return cls(**changes)


@dataclass(frozen=True)
class Scene:
    """One collage: picture (3, H, W) in 0…1, visible masks (N, H, W) of *all* subjects, zero for an absent one."""

    picture: Tensor
    masks: Tensor
    prompt: str
    named: tuple[int, ...]
    """Numbers of the subjects in the order of the prompt."""
    places: tuple[float, ...]
    """Horizontal centre of each named subject, in the order of the prompt, 0 = left."""


@dataclass(frozen=True)
class ScenePool:
    """Scenes as a step needs them: latents (P, C, h, w), masks (P, N, h, w) on the latents' grid, prompts."""

    latents: Tensor
    masks: Tensor
    prompts: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.prompts)


def make_scene(
    cutouts: Sequence[Sequence[Image.Image]],
    phrases: Sequence[str],
    size: int,
    rng: np.random.Generator,
    config: CollageConfig = CollageConfig(),
) -> Scene:
    """Draw one scene of ``size`` pixels from each subject's RGBA cut-outs and its phrase."""
    chosen = _choose(len(phrases), rng, config)
    draft = _best_draft(chosen, cutouts, size, rng, config)
    masks = np.zeros((len(phrases), size, size), np.float32)
    masks[chosen] = draft.masks
    order = [int(number) for number in rng.permutation(len(chosen))]
    if config.on_slots:
        order.sort(key=draft.places.__getitem__)
    named = tuple(chosen[number] for number in order)
    places = tuple(draft.places[number] for number in order)
    related = len(named) == 2 and rng.random() < config.relation
    prompt = f"{_subjects([phrases[number] for number in named], places, related)} {draft.background}"
    return Scene(to_tensor(draft.picture), torch.from_numpy(masks), prompt, named, places)


def _subjects(phrases: Sequence[str], places: Sequence[float], related: bool) -> str:
    """ "a zwx robot and a vyq alien", or "… left of …" where the caption says so."""
    first, *rest = map(article, phrases)
    if related:
        return f"{first} {'left of' if places[0] < places[1] else 'right of'} {rest[0]}"
    return " and ".join([", ".join([first, *rest[:-1]]), *rest[-1:]])


def make_pool(
    pipe: Any,
    base: Base,
    subjects: Sequence[Subject],
    count: int,
    seed: int,
    *,
    size: int | None = None,
    config: CollageConfig | None = None,
) -> ScenePool:
    """``count`` scenes, encoded. The same seed gives the same scenes; other seeds give others."""
    config = config or CollageConfig.of(base)
    cutouts = [subject_cutouts(subject) for subject in subjects]
    phrases = [subject.phrase for subject in subjects]
    side = size or base.resolution
    latents, masks, prompts = [], [], []
    for start in range(0, count, BATCH):
        rngs = [np.random.default_rng([seed, 23, number]) for number in range(start, min(start + BATCH, count))]
        scenes = [make_scene(cutouts, phrases, side, rng, config) for rng in rngs]
        latents.append(to_latents(pipe, base, torch.stack([scene.picture for scene in scenes])))
        whole = torch.stack([scene.masks for scene in scenes]).to(latents[-1].device)
        masks.append(torch.nn.functional.adaptive_avg_pool2d(whole, latents[-1].shape[-2:]))
        prompts += [scene.prompt for scene in scenes]
    return ScenePool(torch.cat(latents), torch.cat(masks), tuple(prompts))


def subject_cutouts(subject: Subject) -> tuple[Image.Image, ...]:
    """The subject's cut-outs. Raises InvalidRequest where no view has a mask."""
    cutouts = subject.cutouts
    if not cutouts:
        raise InvalidRequest(
            f"No picture of {subject.name} has a transparent background, which collages need; "
            "give cut-outs as PNG, or none at all, and the expert makes its own."
        )
    return cutouts


@dataclass(frozen=True)
class _Draft:
    picture: Image.Image
    masks: np.ndarray  # visible parts of the chosen subjects
    places: list[float]
    background: str
    shown: float  # of the subject that is hidden most


def _best_draft(
    chosen: list[int],
    cutouts: Sequence[Sequence[Image.Image]],
    size: int,
    rng: np.random.Generator,
    config: CollageConfig,
) -> _Draft:
    """The first draft in which enough of everyone is visible, else the best of them."""
    best = _draft(chosen, cutouts, size, rng, config)
    for _ in range(ATTEMPTS - 1):
        if best.shown >= config.min_visible:
            break
        best = max(best, _draft(chosen, cutouts, size, rng, config), key=lambda draft: draft.shown)
    return best


def _draft(
    chosen: list[int],
    cutouts: Sequence[Sequence[Image.Image]],
    size: int,
    rng: np.random.Generator,
    config: CollageConfig,
) -> _Draft:
    layers, areas, places = _arrange(chosen, cutouts, size, rng, config)
    depth = [int(number) for number in rng.permutation(len(chosen))]  # bottom first
    background = random_background(size, rng)
    picture, visible = paste(background.picture, [layers[number] for number in depth])
    masks = visible[np.argsort(depth)]
    shown = min(float(mask.sum()) / area for mask, area in zip(masks, areas, strict=True))
    return _Draft(picture, masks, places, background.phrase, shown)


def _choose(count: int, rng: np.random.Generator, config: CollageConfig) -> list[int]:
    """Which subjects appear: one, or two to all of them."""
    alone = count == 1 or rng.random() < config.single
    present = 1 if alone else int(rng.integers(2, count + 1)) if count > 3 else count
    return [int(number) for number in rng.permutation(count)[:present]]


def _arrange(
    chosen: list[int],
    cutouts: Sequence[Sequence[Image.Image]],
    size: int,
    rng: np.random.Generator,
    config: CollageConfig,
) -> tuple[list[Image.Image], list[float], list[float]]:
    """Layers, whole areas in pixels and horizontal centres: neighbours in a row, in an order of their own."""
    count = len(chosen)
    layers, areas, places = [], [], []
    for number, slot in zip(chosen, rng.permutation(count), strict=True):
        view = cutouts[number][int(rng.integers(len(cutouts[number])))]
        if config.on_slots and count in EXTENTS:
            x, y, scale = slots(count)[slot]
        else:
            scale = float(rng.uniform(*config.scales)) * min(1.25, (2 / count) ** 0.7)
            x = float((slot + 0.5) / count + rng.uniform(-0.225, 0.225) / count)
            y = float(0.5 + rng.uniform(-0.5, 0.5) * max(1 - scale * view.height / max(view.size), 0.1))
        x, y = snap(x, size), snap(y, size)
        mirrored = bool(config.flip and rng.random() < 0.5)
        whole = fit(view, size, Placement(0.5, 0.5, scale, mirrored))
        layers.append(fit(view, size, Placement(x, y, scale, mirrored, float(rng.uniform(0.2, 0.8)))))
        areas.append(max(float(np.asarray(whole.getchannel("A"), np.float32).sum()) / 255, 1.0))
        places.append(x)
    return layers, areas, places
