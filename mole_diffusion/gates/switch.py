"""LoRA Switch: the experts take turns (arXiv 2402.16843)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from mole_diffusion.errors import InvalidRequest
from mole_diffusion.functional import nla_weights
from mole_diffusion.gates.config import LoraSwitch
from mole_diffusion.gates.protocol import Run, Total


class Turns(nn.Module):
    """In step t the expert (⌊t / τ⌋ mod k) of the k active ones has its strength, the others 0; t counts from 0.

    The paper counts from 1 and writes ⌊((t − 1) mod k·τ) / τ⌋ + 1, the same. Masked experts lose their turn; rows with
    their own subsets have their own turns. Text encoders, of which the paper says nothing, get NLA.

    A step is one call of the main model since the prompts were announced: samplers that call it twice per step (Heun)
    switch twice as fast.

    Attributes:
        strengths: (N,).
    """

    total: Total = "free"
    strengths: Tensor

    def __init__(self, experts: int, config: LoraSwitch) -> None:
        super().__init__()
        self.every = config.every
        self.register_buffer("strengths", strengths(config.weights, experts))

    def at(self, run: Run) -> Tensor:
        """(1, rows or 1, 1, N)."""
        chosen = turn(run.mask, run.step // self.every)
        return (self.strengths * chosen).reshape(1, -1, 1, run.experts)

    def once(self, mask: Tensor) -> Tensor:
        """NLA of the strengths, (1, rows or 1, 1, N)."""
        return (self.strengths * nla_weights(mask.shape[-1], mask)).reshape(1, -1, 1, mask.shape[-1])


def turn(mask: Tensor, number: int) -> Tensor:
    """Whose turn it is: the active experts one after the other, and round again.

    Args:
        mask: (…, N) bool, True = active.
        number: of the turn, from 0.

    Returns:
        (…, N) bool, at most one True.
    """
    places = mask.long().cumsum(-1) - 1
    return mask & (places == number % mask.sum(-1, keepdim=True).clamp_min(1))


def strengths(weights: Sequence[float], experts: int) -> Tensor:
    """(N,) fp32; 1 each where none are given.

    Raises:
        InvalidRequest: not one per expert.
    """
    if weights and len(weights) != experts:
        raise InvalidRequest(f"Expected one weight for each of {experts} gated experts, got {len(weights)}.")
    return torch.tensor(tuple(weights) or (1.0,) * experts)
