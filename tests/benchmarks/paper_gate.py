"""MoLE's gate to the letter (arXiv 2404.13628, Eq. 7-13), as a yardstick: every expert runs the whole block alone.

Eq. 9 does not say which normalisation: LayerNorm over the channels here. The gate's e ∈ R^{N·L·d×N} fixes the number of
experts and the resolution.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mole_diffusion.experts import Expert, LowRank


class OneOf(nn.Module):
    """A linear layer that adds one low-rank pair, or none where ``chosen`` is None."""

    def __init__(self, base: nn.Linear, pairs: Mapping[int, LowRank]) -> None:
        super().__init__()
        self.base = base
        self.chosen: int | None = None
        self.pairs = {
            index: (pair.a.to(base.weight), (pair.b * pair.scale).to(base.weight)) for index, pair in pairs.items()
        }

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        y = self.base(x, *args, **kwargs)
        if self.chosen not in self.pairs:
            return y
        a, b = self.pairs[self.chosen]
        return y + F.linear(F.linear(x, a), b)


class PaperBlock(nn.Module):
    """A BasicTransformerBlock under the paper's gate: (B, L, d) → (B, L, d).

    Args:
        block: the block; its targets become :class:`OneOf`.
        modules: module path inside the block → expert → pair.
        experts: N.
        shape: (L, d) of the block's input.
    """

    def __init__(
        self, block: nn.Module, modules: Mapping[str, Mapping[int, LowRank]], experts: int, shape: tuple[int, int]
    ) -> None:
        super().__init__()
        like = next(block.parameters())
        self.block, self.experts = block, experts
        self.layers: list[OneOf] = []
        for path, pairs in modules.items():
            base = block.get_submodule(path)
            assert isinstance(base, nn.Linear)
            self.layers.append(OneOf(base, pairs))
            block.set_submodule(path, self.layers[-1])
        inputs = experts * shape[0] * shape[1]
        self.e = nn.Parameter(torch.randn(inputs, experts, device=like.device, dtype=like.dtype) / math.sqrt(inputs))
        self.log_tau = nn.Parameter(torch.zeros((), device=like.device))

    def alone(self, expert: int | None, *args: Any, **kwargs: Any) -> Tensor:
        """Eq. 7-8: the block with one expert; with None the frozen block F_θ."""
        for layer in self.layers:
            layer.chosen = expert
        return self.block(*args, **kwargs)

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        outputs = torch.stack([self.alone(index, *args, **kwargs) for index in range(self.experts)], 1)
        normed = F.layer_norm(outputs, outputs.shape[-1:])  # Eq. 9
        logits = normed.flatten(1) @ self.e  # Eq. 10
        gate = (logits.float() / self.log_tau.exp()).softmax(-1).to(outputs.dtype)  # Eq. 11
        return self.alone(None, *args, **kwargs) + torch.einsum("bn,bnld->bld", gate, outputs)  # Eq. 12-13


def block_shapes(unet: nn.Module, call: Any) -> dict[str, tuple[int, int]]:
    """(L, d) at the input of every BasicTransformerBlock, seen in one ``call()``."""
    from diffusers.models.attention import BasicTransformerBlock

    seen: dict[str, tuple[int, int]] = {}

    def watch(path: str) -> Any:
        return lambda _, args, kwargs: seen.update(
            {path: tuple((args[0] if args else kwargs["hidden_states"]).shape[1:])}
        )

    blocks = [(path, module) for path, module in unet.named_modules() if isinstance(module, BasicTransformerBlock)]
    handles = [module.register_forward_pre_hook(watch(path), with_kwargs=True) for path, module in blocks]
    call()
    for handle in handles:
        handle.remove()
    return seen


def gate_elements(shapes: Mapping[str, tuple[int, int]], experts: int) -> int:
    """Parameters of all gates: Σ N²·L·d over the blocks."""
    return sum(experts**2 * length * width for length, width in shapes.values())


def install(unet: nn.Module, experts: Sequence[Expert], shapes: Mapping[str, tuple[int, int]]) -> list[PaperBlock]:
    """Put the paper's gate on every transformer block of ``unet``, for good; targets elsewhere are left out."""
    placed = []
    for path, shape in shapes.items():
        prefix = f"unet.{path}."
        modules: dict[str, dict[int, LowRank]] = {}
        for index, expert in enumerate(experts):
            for key, pair in expert.modules.items():
                if key.startswith(prefix):
                    modules.setdefault(key.removeprefix(prefix), {})[index] = pair
        placed.append(PaperBlock(unet.get_submodule(path), modules, len(experts), shape))
        unet.set_submodule(path, placed[-1])
    return placed
