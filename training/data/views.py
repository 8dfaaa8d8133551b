"""Pools of training pictures as latents, made before the first step: a step is then the UNet alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from mole_diffusion.bases import Base
from training.base.scenes import COLOURS, article

from .augment import augment
from .paste import to_tensor
from .pictures import has_mask
from .subjects import Subject

BATCH = 8


@dataclass(frozen=True)
class ViewPool:
    """Latents (P, C, h, w), float32, their captions, and weights (P, 1, 1, w) of mean 1 for what counts of them."""

    latents: torch.Tensor
    captions: tuple[str, ...]
    weights: torch.Tensor | None = None


def view_pool(
    pipe: Any, base: Base, subject: Subject, size: int, count: int, seed: int, *, flip: bool = True
) -> ViewPool:
    """``count`` augmented pictures of a subject; of photos only each one and its mirror image."""
    if not any(has_mask(view) for view in subject.views):
        count = min(count, len(subject.views) * (4 if flip else 1))
    latents, captions, counted = [], [], []
    for start in range(0, count, BATCH):
        made = [
            augment(
                subject.views[number % len(subject.views)], subject.phrase, size, _rng(seed, number), flip=flip,
                on_slots=base.on_slots,
            )
            for number in range(start, min(start + BATCH, count))
        ]  # fmt: skip
        latents.append(to_latents(pipe, base, torch.stack([item.picture for item in made])))
        captions += [item.caption for item in made]
        counted += [_columns(latents[-1].shape[-1], item.counted) for item in made]
    return ViewPool(torch.cat(latents), tuple(captions), torch.stack(counted).to(latents[0].device))


def _columns(width: int, counted: tuple[float, float]) -> torch.Tensor:
    """(1, 1, width) weights of mean 1: the columns that count, by their centres."""
    centres = (torch.arange(width) + 0.5) / width
    inside = ((centres > counted[0]) & (centres < counted[1])).float()
    return (inside / inside.mean())[None, None]


def class_pool(pipe: Any, base: Base, class_name: str, size: int, count: int, seed: int) -> ViewPool:
    """``count`` pictures of the class that the base itself makes (prior preservation, arXiv 2208.12242 section 3.3)."""
    from mole_diffusion.generation import GenerationRequest, generate

    colours = list(COLOURS)
    captions = [f"{article(class_name)} on {article(colours[n % len(colours)])} background" for n in range(count)]
    pictures = []
    for number, caption in enumerate(captions):
        request = GenerationRequest(
            caption, seed=seed + number, steps=base.default_steps, guidance=base.default_guidance, width=size,
            height=size, score_every=0, preview_every=0,
        )  # fmt: skip
        pictures.append(to_tensor(generate(pipe, base, request).images[0]))
    return ViewPool(to_latents(pipe, base, torch.stack(pictures)), tuple(captions))


@torch.no_grad()
def to_latents(pipe: Any, base: Base, pictures: torch.Tensor) -> torch.Tensor:
    """Pictures (P, 3, H, W) in 0…1 to latents (P, C, h, w), the posterior's mean, float32, on the UNet's device."""
    return torch.cat([base.to_latents(pipe, part.to(pipe.unet.device)).float() for part in pictures.split(BATCH)])


def _rng(seed: int, number: int) -> np.random.Generator:
    return np.random.default_rng([seed, 11, number])
