"""Pools of training pictures as latents, made before the first step: a step is then the UNet alone."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from mole_diffusion.bases import Base
from training.base.scenes import COLOURS, article

from .augment import augment
from .captions import names_a_side
from .paste import to_tensor
from .pictures import has_mask, read_picture
from .subjects import Subject

BATCH = 8


@dataclass(frozen=True)
class ViewPool:
    """Latents (P, C, h, w), float32, their captions, and weights (P, 1, 1, w) of mean 1 for what counts of them."""

    latents: torch.Tensor
    captions: tuple[str, ...]
    weights: torch.Tensor | None = None


def view_pool(
    pipe: Any, base: Base, subject: Subject, size: int, count: int, seed: int, *, flip: bool = False
) -> ViewPool:
    """``count`` augmented pictures of a subject; of photos only each one, and its mirror image with ``flip``.

    What a caption says of left and right would be wrong in a mirror, so its picture is never mirrored.
    """
    if not any(has_mask(view) for view in subject.views):
        count = min(count, len(subject.views) * (4 if flip else 1))
    given = subject.captions or (None,) * len(subject.views)
    latents, captions, counted = [], [], []
    for start in range(0, count, BATCH):
        made = []
        for number in range(start, min(start + BATCH, count)):
            which = number % len(subject.views)
            caption = given[which]
            made.append(
                augment(
                    subject.views[which], subject.phrase, size, _rng(seed, number), caption=caption,
                    flip=flip and not names_a_side(caption or ""), on_slots=base.on_slots,
                )
            )  # fmt: skip
        latents.append(to_latents(pipe, base, torch.stack([item.picture for item in made])))
        captions += [item.caption for item in made]
        counted += [_columns(latents[-1].shape[-1], item.counted) for item in made]
    return ViewPool(torch.cat(latents), tuple(captions), torch.stack(counted).to(latents[0].device))


def _columns(width: int, counted: tuple[float, float]) -> torch.Tensor:
    """(1, 1, width) weights of mean 1: the columns that count, by their centres."""
    centres = (torch.arange(width) + 0.5) / width
    inside = ((centres > counted[0]) & (centres < counted[1])).float()
    return (inside / inside.mean())[None, None]


def class_pool(
    pipe: Any, base: Base, class_name: str, size: int, count: int, seed: int, *, together: int = 1,
    folder: Path | None = None,
) -> ViewPool:  # fmt: skip
    """``count`` pictures of the class that the base itself makes (prior preservation, arXiv 2208.12242 section 3.3).

    ``together`` of them are made at once. In ``folder`` they are kept: what is there already is not made again.
    """
    colours = list(COLOURS)
    kept = None if folder is None else folder / class_key(base, class_name, size, seed, together)
    pictures, captions = [], []
    for block, start in enumerate(range(0, count, together)):
        caption = f"{article(class_name)} on {article(colours[block % len(colours)])} background"
        here = min(together, count - start)
        pictures += _class_pictures(pipe, base, caption, size, range(seed + start, seed + start + here), kept)
        captions += [caption] * here
    return ViewPool(to_latents(pipe, base, torch.stack([to_tensor(picture) for picture in pictures])), tuple(captions))


def class_key(base: Base, class_name: str, size: int, seed: int, together: int) -> str:
    """Name of the folder of class pictures that were made alike."""
    made_from = f"{base.name}|{base.revision}|{class_name.strip()}|{size}|{seed}|{together}"
    return f"class-{hashlib.sha256(made_from.encode()).hexdigest()[:12]}"


def _class_pictures(
    pipe: Any, base: Base, caption: str, size: int, seeds: range, kept: Path | None
) -> Sequence[Image.Image]:
    """One picture for each seed, all from ``caption``; from the folder where all of them are there."""
    from mole_diffusion.generation import GenerationRequest, generate

    paths = [] if kept is None else [kept / f"{seed}.png" for seed in seeds]
    if paths and all(path.is_file() for path in paths):
        return [read_picture(path) for path in paths]
    request = GenerationRequest(
        caption, seed=seeds[0], count=len(seeds), steps=base.default_steps, guidance=base.default_guidance, width=size,
        height=size, score_every=0, preview_every=0,
    )  # fmt: skip
    pictures = generate(pipe, base, request).images
    for path, picture in zip(paths, pictures, strict=False):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.{os.getpid()}")
        picture.save(temporary, "PNG")
        os.replace(temporary, path)
    return pictures


@torch.no_grad()
def to_latents(pipe: Any, base: Base, pictures: torch.Tensor) -> torch.Tensor:
    """Pictures (P, 3, H, W) in 0…1 to latents (P, C, h, w), the posterior's mean, float32, on the UNet's device."""
    # Activations of a full-size autoencoder in float32 take gigabytes for each picture.
    together = 1 if base.full_size else BATCH
    with _exact(pipe.vae):
        parts: Sequence[torch.Tensor] = pictures.split(together)
        return torch.cat([base.to_latents(pipe, part.to(pipe.unet.device)).float() for part in parts])


@contextmanager
def _exact(vae: Any) -> Iterator[None]:
    """The autoencoder in float32: what it encodes once is learned from in every step, and SDXL's overflows in fp16."""
    dtype = vae.dtype
    if dtype == torch.float32:
        yield
        return
    vae.to(dtype=torch.float32)
    try:
        yield
    finally:
        vae.to(dtype=dtype)


def _rng(seed: int, number: int) -> np.random.Generator:
    return np.random.default_rng([seed, 11, number])
