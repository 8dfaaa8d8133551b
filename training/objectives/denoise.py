"""The denoising error that every task here minimises, for ε and v alike."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any, Literal

import torch
from torch import Tensor

from mole_diffusion.bases import Base, Conditioning

Precision = Literal["float32", "bfloat16"]


def choose_precision(asked: Precision | None, base: Base, device: torch.device) -> Precision:
    """What was asked for; else bfloat16 for full-size bases on CUDA, float32 for small bases and elsewhere."""
    if asked is not None:
        return asked
    return "bfloat16" if device.type == "cuda" and base.full_size else "float32"


def autocast(device: torch.device, precision: Precision) -> AbstractContextManager[Any]:
    """The context of a training step: bfloat16 where it was asked for; weights that train stay float32."""
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bfloat16")


def squared_error(
    pipe: Any, base: Base, latents: Tensor, noise: Tensor, t: Tensor, conditioning: Conditioning
) -> Tensor:
    """(target − UNet(x_t, t))² in float32, shape (B, C, h, w), target by the base's prediction type.

    ``latents`` and ``noise`` are (B, C, h, w), ``t`` (B,) timesteps.
    """
    answer = ask(pipe, base, latents, noise, t, conditioning)
    return (answer - base.denoise_target(pipe.scheduler, latents, noise, t).float()).square()


def ask(pipe: Any, base: Base, latents: Tensor, noise: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
    """What the UNet answers for latents (B, C, h, w) noised to ``t`` (B,), float32."""
    noisy = pipe.scheduler.add_noise(latents, noise, t).to(pipe.unet.dtype)
    return pipe.unet(noisy, t, **base.unet_kwargs(conditioning), return_dict=False)[0].float()


def min_snr_weights(pipe: Any, base: Base, t: Tensor, gamma: float) -> Tensor:
    """Weights (B,) of arXiv 2303.09556: min(SNR, γ)/SNR for ε and min(SNR, γ)/(SNR + 1) for v."""
    signal = pipe.scheduler.alphas_cumprod.to(t.device)[t].float()
    snr = (signal / (1 - signal)).clamp(min=1e-8)
    divisor = snr + 1 if base.prediction_type == "v_prediction" else snr
    return snr.clamp(max=gamma) / divisor


def draw_noise(
    shape: torch.Size, timesteps: int, generator: torch.Generator, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Noise of ``shape`` and timesteps (B,) in 0…timesteps−1, drawn on the CPU so that they do not depend on it."""
    noise = torch.randn(shape, generator=generator)
    t = torch.randint(0, timesteps, (shape[0],), generator=generator)
    return noise.to(device), t.to(device)
