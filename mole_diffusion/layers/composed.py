"""Two GEMMs for any number of experts: y = W·x + B·(g ⊙ (A·x))."""

from __future__ import annotations

from typing import Any, Protocol, cast

import torch.nn.functional as F
from torch import Tensor, nn

from mole_diffusion.layers.bank import ExpertBank


class Weigher(Protocol):
    """What a composed layer asks for its weights."""

    def linear(self, key: str, bank: ExpertBank, x: Tensor) -> Tensor | None:
        """Weights that broadcast with A·x: (…, R), fp32; None = the base alone."""
        ...

    def conv(self, key: str, bank: ExpertBank, down: tuple[int, int]) -> Tensor | None:
        """Weights (B|1, R, H|1, W|1) on the grid of A's output, fp32; None = the base alone."""
        ...


class _Composed(nn.Module):
    """A frozen module kept whole inside, with the experts beside it; unknown attributes are the base's."""

    def __init__(self, base: nn.Module, bank: ExpertBank, context: Weigher, key: str) -> None:
        super().__init__()
        self.base = base
        self.bank = bank
        self.key = key
        self.context = context
        self.training = base.training

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("base"), name)


class ComposedLinear(_Composed):
    """x: (…, d_in) → (…, d_out)."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        y = self.base(x, *args, **kwargs)
        gates = self.context.linear(self.key, self.bank, x)
        if gates is None:
            return y
        down = F.linear(x, self.bank.a)
        return y + F.linear((down * gates).to(down.dtype), self.bank.b)


class ComposedConv2d(_Composed):
    """x: (B, c_in, H, W) → (B, c_out, H', W'); A is a k×k convolution like the base's, B a 1×1 one.

    The gate acts on the grid of A's output, which is the grid of the base's output.
    """

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        base = cast(nn.Conv2d, self.base)
        y = base(x, *args, **kwargs)
        gates = self.context.conv(self.key, self.bank, (y.shape[-2], y.shape[-1]))
        if gates is None:
            return y
        down = F.conv2d(_padded(base, x), self.bank.a, None, base.stride, _padding(base), base.dilation)
        return y + F.conv2d((down * gates).to(down.dtype), self.bank.b[..., None, None])


def compose_layer(base: nn.Module, bank: ExpertBank, context: Weigher, key: str) -> ComposedLinear | ComposedConv2d:
    """The composed layer for a Linear or Conv2d."""
    kind = ComposedConv2d if isinstance(base, nn.Conv2d) else ComposedLinear
    return kind(base, bank, context, key)


def _padded(base: nn.Conv2d, x: Tensor) -> Tensor:
    if base.padding_mode == "zeros":
        return x
    return F.pad(x, base._reversed_padding_repeated_twice, mode=base.padding_mode)


def _padding(base: nn.Conv2d) -> Any:
    return base.padding if base.padding_mode == "zeros" else 0
