"""One interface over what a UNet predicts: noise (ε) or velocity (v). Zero terminal SNR included.

With ᾱ the scheduler's cumulative product, x_t = √ᾱ·x0 + √(1−ᾱ)·ε:

    ε: target = ε                       x0 = (x_t − √(1−ᾱ)·ε̂) / √ᾱ
    v: target = √ᾱ·ε − √(1−ᾱ)·x0        x0 = √ᾱ·x_t − √(1−ᾱ)·v̂       (arXiv 2202.00512, appendix D)

At zero terminal SNR (arXiv 2305.08891) ᾱ is 0 at the last timestep, where ε says nothing about x0: only v works there.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mole_diffusion.errors import InvalidRequest


@dataclass(frozen=True)
class Prediction:
    """Target and inverse of one prediction type; arguments are (√ᾱ, √(1−ᾱ), …) broadcast to the latents."""

    target: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
    clean: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def _epsilon_clean(signal: Tensor, noise_level: Tensor, latents: Tensor, output: Tensor) -> Tensor:
    if bool((signal == 0).any()):
        raise InvalidRequest(
            "A base that predicts noise has no x0 at zero terminal SNR: its scheduler does not fit it."
        )
    return (latents - noise_level * output) / signal


PREDICTIONS: dict[str, Prediction] = {
    "epsilon": Prediction(target=lambda a, s, x0, noise: noise, clean=_epsilon_clean),
    "v_prediction": Prediction(
        target=lambda a, s, x0, noise: a * noise - s * x0, clean=lambda a, s, latents, output: a * latents - s * output
    ),
}


def prediction(name: str) -> Prediction:
    """The prediction type of that name; raises InvalidRequest for one that is not supported."""
    if name not in PREDICTIONS:
        raise InvalidRequest(f"Expected a base that predicts {' or '.join(PREDICTIONS)}, got {name!r}.")
    return PREDICTIONS[name]


def levels(scheduler: Any, t: Tensor | int, like: Tensor) -> tuple[Tensor, Tensor]:
    """√ᾱ and √(1−ᾱ) at timesteps ``t`` (one for all rows, or one per row), shaped to broadcast over ``like``."""
    alphas = scheduler.alphas_cumprod.to(device=like.device, dtype=torch.float32)
    chosen = alphas[torch.as_tensor(t, device=like.device).reshape(-1)]
    chosen = chosen.reshape(-1, *([1] * (like.ndim - 1)))
    return chosen.sqrt().to(like.dtype), (1 - chosen).sqrt().to(like.dtype)
