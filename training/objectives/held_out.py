"""How well a composition denoises scenes that no training saw: paired errors, the same for every method."""

from __future__ import annotations

from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from mole_diffusion.bases import Base
from training.data.prompts import EncodedPrompts
from training.rng import step_generator

from .collage import ScenePool
from .denoise import Precision, autocast, choose_precision, squared_error

if TYPE_CHECKING:
    from mole_diffusion import Composition
    from mole_diffusion.trace import Trace


@torch.no_grad()
def held_out_collage_loss(
    composition: Composition | None,
    pipe: Any,
    base: Base,
    pool: ScenePool,
    *,
    seed: int = 1_000_003,
    draws: int = 4,
    batch: int = 8,
    on_subjects: bool = False,
    prompts: EncodedPrompts | None = None,
    precision: Precision | None = None,
    traces: list[Trace] | None = None,
) -> np.ndarray:
    """Mean squared denoising error of each scene of ``pool``, shape (len(pool),), float64.

    Noise and timesteps depend on ``seed`` and the scene alone, so two compositions are compared scene by scene.
    The ``draws`` timesteps of a scene are spread evenly over the schedule.

    Args:
        composition: attached for the call if it is not; None: the base alone.
        on_subjects: only over places where a subject is, instead of the whole picture.
        prompts: the pool's prompts already encoded with this composition.
        traces: takes the composition's weights, batch by batch.
    """
    attached = composition is None or composition.attached
    with nullcontext() if attached or composition is None else composition:
        side = base.resolution * pool.latents.shape[-1] // base.latent_shape()[-1]
        table = prompts if prompts is not None else EncodedPrompts(base, pipe, pool.prompts, side)
        was_training = composition is not None and composition.gate.training
        if composition is not None:
            composition.eval()
        parts = [
            _errors(composition, pipe, base, pool, table, range(at, min(at + batch, len(pool))), seed, draws,
                    on_subjects, choose_precision(precision, base, pool.latents.device), traces)
            for at in range(0, len(pool), batch)
        ]  # fmt: skip
        if composition is not None and was_training:
            composition.train()
    return np.concatenate(parts)


def _errors(
    composition: Composition | None,
    pipe: Any,
    base: Base,
    pool: ScenePool,
    table: EncodedPrompts,
    rows: range,
    seed: int,
    draws: int,
    on_subjects: bool,
    precision: Precision,
    traces: list[Trace] | None,
) -> np.ndarray:
    latents = pool.latents[rows.start : rows.stop]
    texts = list(pool.prompts[rows.start : rows.stop])
    conditioning = table.rows(texts)
    weights = pool.masks[rows.start : rows.stop].sum(1, keepdim=True).clamp(0, 1)
    total = torch.zeros(len(rows), dtype=torch.float64)
    for draw in range(draws):
        noise, t = _noise(latents.shape[1:], rows, seed, draw, draws, pipe.scheduler.config.num_train_timesteps)
        if composition is not None:
            composition.condition(texts, guidance=False)
        with autocast(latents.device, precision):
            errors = squared_error(pipe, base, latents, noise.to(latents.device), t.to(latents.device), conditioning)
        if composition is not None and traces is not None:
            traces.append(composition.trace())
        total += (_weighted(errors, weights) if on_subjects else errors.mean((1, 2, 3))).double().cpu()
    return (total / draws).numpy()


def _noise(
    shape: torch.Size, rows: range, seed: int, draw: int, draws: int, timesteps: int
) -> tuple[torch.Tensor, torch.Tensor]:
    generators = [step_generator(seed, 3, row * draws + draw) for row in rows]
    noise = torch.stack([torch.randn(shape, generator=generator) for generator in generators])
    offsets = torch.tensor([float(torch.rand((), generator=generator)) for generator in generators])
    t = ((draw + offsets) / draws * timesteps).long().clamp(max=timesteps - 1)
    return noise, t


def _weighted(errors: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    return (errors * weights).sum((1, 2, 3)) / (weights.sum((1, 2, 3)) * errors.shape[1]).clamp(min=1e-6)
