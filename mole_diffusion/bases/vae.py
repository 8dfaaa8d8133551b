"""Latents and pictures: the scaling that every pipeline applies around its autoencoder."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def decode_latents(vae: Any, latents: Tensor) -> Tensor:
    """Pictures (B, 3, H, W) in 0…1, float32, from latents (B, C, h, w) as the UNet sees them."""
    with _safe_precision(vae) as dtype:
        pictures = vae.decode(latents.to(dtype) / vae.config.scaling_factor, return_dict=False)[0]
    return (pictures.float() / 2 + 0.5).clamp(0, 1)


def encode_pictures(vae: Any, pictures: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
    """Latents as the UNet sees them from pictures (B, 3, H, W) in 0…1.

    Without a generator the posterior's mean is taken, with one a sample of the posterior.
    """
    with _safe_precision(vae) as dtype:
        posterior = vae.encode((pictures * 2 - 1).to(dtype)).latent_dist
        latents = posterior.mode() if generator is None else posterior.sample(generator)
    return latents * vae.config.scaling_factor


class _safe_precision:
    """Runs an autoencoder that overflows in fp16 (``force_upcast``, SDXL's own) in fp32, then puts it back."""

    def __init__(self, vae: Any) -> None:
        self._vae = vae
        self._upcast = vae.dtype == torch.float16 and bool(vae.config.get("force_upcast", False))

    def __enter__(self) -> torch.dtype:
        if self._upcast:
            self._vae.to(dtype=torch.float32)
        return self._vae.dtype

    def __exit__(self, *exception: object) -> None:
        if self._upcast:
            self._vae.to(dtype=torch.float16)
