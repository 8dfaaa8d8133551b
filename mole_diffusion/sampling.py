"""The denoising loop over a pipeline's own parts, with classifier-free guidance."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from mole_diffusion.bases.conditioning import Conditioning


@dataclass(frozen=True)
class Step:
    """After one step: its 0-based index, the latents (B, C, h, w), and the clean latents it points to."""

    index: int
    latents: Tensor
    x0: Tensor


def initial_noise(seeds: Sequence[int], shape: tuple[int, int, int]) -> Tensor:
    """Unit Gaussian noise (B, *shape), one seed per row, drawn on the CPU in float32.

    So the same seed gives the same noise on every device, and a row does not depend on its neighbours.
    """
    rows = [torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
    return torch.stack(rows)


def sample(
    pipe: Any, noise: Tensor, conditioning: Conditioning, steps: int, guidance: float, rescale: float
) -> Iterator[Step]:
    """Denoise ``noise`` (B, C, h, w) step by step; stop by not asking for the next step.

    Args:
        pipe: any pipeline with ``unet`` and ``scheduler``; its scheduler is copied, not touched.
        conditioning: B rows, or 2·B with the unconditional ones first where ``guidance`` is above 1.
        rescale: φ of :func:`guide`.
    """
    scheduler = copy.deepcopy(pipe.scheduler)
    scheduler.set_timesteps(steps, device=pipe.unet.device)
    latents = noise.to(pipe.unet.device, pipe.unet.dtype) * scheduler.init_noise_sigma
    repeats = 2 if guidance > 1 else 1
    for index, t in enumerate(scheduler.timesteps):
        inputs = scheduler.scale_model_input(torch.cat([latents] * repeats), t)
        output = pipe.unet(inputs, t, **conditioning.unet_kwargs, return_dict=False)[0]
        if repeats == 2:
            output = guide(*output.chunk(2), guidance, rescale)
        step = scheduler.step(output, t, latents)
        latents = step.prev_sample.to(latents.dtype)
        yield Step(index, latents, step.pred_original_sample)


def guide(unconditional: Tensor, conditional: Tensor, scale: float, rescale: float) -> Tensor:
    """Classifier-free guidance, with the contrast put back that it adds (arXiv 2305.08891, equations 14 to 16).

    Args:
        unconditional, conditional: the UNet's answers (B, C, h, w).
        scale: guidance w; 1 = the conditional answer.
        rescale: φ, 0 = plain guidance, 1 = the spread of the conditional answer exactly.
    """
    guided = unconditional + scale * (conditional - unconditional)
    if rescale == 0:
        return guided
    axes = tuple(range(1, guided.ndim))
    matched = guided * (conditional.std(dim=axes, keepdim=True) / guided.std(dim=axes, keepdim=True))
    return rescale * matched + (1 - rescale) * guided
