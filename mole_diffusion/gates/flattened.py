"""The paper's gate to the letter (arXiv 2404.13628, Eq. 9-11): the slow reference, for one N and one size."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from mole_diffusion.errors import InvalidRequest
from mole_diffusion.gates.block import scaled
from mole_diffusion.gates.config import GateConfig
from mole_diffusion.gates.protocol import BlockSpec


class FlattenedGate(nn.Module):
    """G = softmax(ε / τ) with ε = Flatten(E_Ω)ᵀ·e: every number of every expert's output has its own weight.

    A row of ``logits.weight`` is a column of e, N·L·d numbers, zero at the start, so that training starts at NLA. There
    is no hidden layer and no timestep here.

    Args:
        block: the place; its stride says how many tokens the latents become there.
        experts: N.
        config: with ``latent``, the height and width of the latents.

    Raises:
        InvalidRequest: nobody knows how many tokens this place has.
    """

    def __init__(self, block: BlockSpec, experts: int, config: GateConfig) -> None:
        super().__init__()
        if not block.stride or config.latent is None:
            raise InvalidRequest(
                f"The flattened input needs to know how many tokens {block.name or 'the model'} has, and this model "
                "does not say: choose the input expert_outputs, which works at any size."
            )
        self.config = config
        self.places = math.prod(math.ceil(side / block.stride) for side in config.latent)
        width = experts * self.places * (block.out_width or block.width)
        self.logits = nn.Linear(width, experts + (config.scale == "null"), bias=False)
        self.log_tau = nn.Parameter(torch.tensor(math.log(config.temperature)))
        self.gain = nn.Parameter(torch.ones(())) if config.gain else None
        nn.init.zeros_(self.logits.weight)

    def forward(
        self,
        features: Tensor,
        mask: Tensor | None = None,
        time: Tensor | None = None,
        spans: Tensor | None = None,
        *,
        pool: bool = True,
        places: Tensor | None = None,
    ) -> Tensor:
        """(B, 1, N) fp32 from E_Ω, (B, L, N·d); all but ``features`` and ``mask`` is what other gates look at.

        Raises:
            InvalidRequest: L is not what the latents of ``config.latent`` become.
        """
        if features.shape[1] != self.places:
            raise InvalidRequest(
                f"This gate is flattened for latents of {self.config.latent}, {self.places} tokens here, but "
                f"{features.shape[1]} came: generate at that size, or train a gate with the input expert_outputs."
            )
        with torch.autocast(features.device.type, enabled=False):
            logits = self.logits(features.float().flatten(1)).unsqueeze(1)
        return scaled(logits, self.log_tau.exp(), self.config.scale, mask)
