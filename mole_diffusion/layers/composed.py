"""Frozen layers with experts beside them: y = W·x + B·(g ⊙ (A·x)), two GEMMs for any number of experts.

Where one weight vector serves many tokens, adding the experts to a copy of the weight is cheaper:
y = (W + (B·g)·A)·x. :func:`merging_pays` decides.
"""

from __future__ import annotations

from typing import Any, Protocol, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mole_diffusion.layers.bank import ExpertBank


class Weigher(Protocol):
    """What a composed layer asks for its weights."""

    def weights(self, layer: ComposedLinear | ComposedConv2d, x: Tensor) -> Tensor | None:
        """Weights of the layer's experts for ``x``, fp32; None = the base alone.

        Linear: (rows, places, n). Convolution: (rows, n, h, w) on the grid of its output. Rows are 1, those of ``x``,
        or a divisor of them: then they repeat, as [all, all, …]. Places or h and w are 1 where all places are alike.
        """
        ...


def merging_pays(rows: int, tokens: int, ranks: int, d_in: int, d_out: int, *, kept: bool = False) -> bool:
    """Is one weight matrix per row cheaper than two thin GEMMs?

    Counts multiplications: rows·R·d_in·d_out against tokens·R·(d_in + d_out), and what it takes to write W′ and A·x as
    that of 16 more ranks.

    Args:
        rows: distinct weight vectors.
        tokens: of all rows together.
        ranks: R.
        kept: A·x is at hand from an earlier step.
    """
    merged = rows * d_in * d_out * (ranks + 16)
    apart = tokens * (d_out + (0 if kept else d_in)) * (ranks + 16)
    return merged < apart


class _Composed(nn.Module):
    """A frozen module kept whole inside, with the experts beside it; unknown attributes are the base's."""

    def __init__(self, base: nn.Module, bank: ExpertBank, context: Weigher, key: str) -> None:
        super().__init__()
        self.base = base
        self.bank = bank
        self.key = key
        self.context = context
        self.shared: SharedDown | None = None
        self.rooms: dict[tuple[torch.Size, torch.device], Tensor] | None = None
        self.training = base.training

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("base"), name)

    def _room(self, weight: Tensor) -> Tensor | None:
        """Memory that layers of one composition share for their merged weights; None = take fresh one."""
        if self.rooms is None or torch.compiler.is_compiling() or weight.is_inference():
            return None
        key = (weight.shape, weight.device)
        if key not in self.rooms:
            with torch.inference_mode(False):
                self.rooms[key] = torch.empty_like(weight, requires_grad=False, memory_format=torch.contiguous_format)
        return self.rooms[key]

    def _mergeable(self, x: Tensor) -> bool:
        """Half precision would swallow small differences; a graph through W' costs more than two thin GEMMs."""
        weight = self.base.weight
        exact = isinstance(weight, Tensor) and weight.dtype == torch.float32 and x.dtype == torch.float32
        return exact and not torch.is_grad_enabled() and not torch.is_autocast_enabled(x.device.type)


class ComposedLinear(_Composed):
    """x: (…, d_in) → (…, d_out)."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if x.ndim > 3:  # weights know rows and places
            return self.forward(x.flatten(1, -2), *args, **kwargs).unflatten(1, x.shape[1:-1])
        weights = self.context.weights(self, x)
        if weights is None:
            return self.base(x, *args, **kwargs)
        bank, rows = self.bank, weights.shape[0]
        alike = weights.shape[1] == 1 and (rows == 1 or x.ndim == 3)
        if alike and type(self.base) is nn.Linear and self._mergeable(x):
            tokens = x.numel() // x.shape[-1]
            kept = self.shared is not None and self.shared.keep
            if merging_pays(rows, tokens, bank.a.shape[0], x.shape[-1], bank.b.shape[0], kept=kept):
                return self._merged(x, weights)
        y = self.base(x, *args, **kwargs)
        if bank.stretch is not None:
            plain = y if self.base.bias is None else y - cast(Tensor, self.base.bias)
            y = y + plain * _by_rows(weights @ bank.stretch.float(), plain)
        return _addmm(y, weigh(self.down(x), weights, bank, own=self.shared is None), bank.b)

    def down(self, x: Tensor) -> Tensor:
        """A·x, (…, R)."""
        return F.linear(x, self.bank.a) if self.shared is None else self.shared(self, x)

    def grid(self, x: Tensor) -> tuple[int, int] | None:
        """A linear layer's tokens do not say how they lie."""
        return None

    def _merged(self, x: Tensor, weights: Tensor) -> Tensor:
        base = cast(nn.Linear, self.base)
        if weights.shape[0] == 1:
            return F.linear(x, self.bank.added(weights[0, 0], base.weight, self._room(base.weight)), base.bias)
        weight = base.weight + self.bank.delta(weights[:, 0], base.weight)
        y = torch.matmul(x.unflatten(0, (-1, weights.shape[0])), weight.mT).flatten(0, 1)
        return y if base.bias is None else y + base.bias


class ComposedConv2d(_Composed):
    """x: (B, c_in, H, W) → (B, c_out, H', W'); A is a k×k convolution like the base's, B a 1×1 one.

    The gate acts on the grid of A's output, which is the grid of the base's output.
    """

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        weights = self.context.weights(self, x)
        base, bank = cast(nn.Conv2d, self.base), self.bank
        if weights is None:
            return base(x, *args, **kwargs)
        if weights.shape[2:] == (1, 1) and weights.shape[0] == 1 and type(base) is nn.Conv2d and self._mergeable(x):
            weight = bank.added(weights[0, :, 0, 0], base.weight, self._room(base.weight))
            return F.conv2d(_padded(base, x), weight, base.bias, base.stride, _padding(base), base.dilation)
        y = base(x, *args, **kwargs)
        if bank.stretch is not None:
            plain = y if base.bias is None else y - base.bias[:, None, None]
            y = y + plain * _by_rows(torch.einsum("bnhw,nd->bdhw", weights, bank.stretch.float()), plain)
        down = weigh(self.down(x), weights, bank, own=True, axis=-3)
        return y + F.conv2d(down, bank.b[..., None, None])

    def down(self, x: Tensor) -> Tensor:
        """A·x, (B, R, H', W')."""
        base = cast(nn.Conv2d, self.base)
        return F.conv2d(_padded(base, x), self.bank.a, None, base.stride, _padding(base), base.dilation)

    def grid(self, x: Tensor) -> tuple[int, int]:
        """Height and width of the output."""
        base = cast(nn.Conv2d, self.base)
        if base.padding == "same":
            return x.shape[2], x.shape[3]
        sides = []
        for axis in (0, 1):
            reach = base.dilation[axis] * (base.kernel_size[axis] - 1)
            sides.append((x.shape[2 + axis] + 2 * _pad(base, axis) - reach - 1) // base.stride[axis] + 1)
        return sides[0], sides[1]


class SharedDown:
    """A·x of modules that read the same input, in one GEMM; of prompts, once for all steps.

    Kept for the very same tensor only, unchanged since, and never inside a graph.
    """

    def __init__(self, members: list[ComposedLinear], *, keep: bool) -> None:
        """``keep``: hold the product until another input comes (text states); else until the last member took it."""
        self.keep = keep
        self._places: dict[str, slice] = {}
        start = 0
        for member in members:
            stop = start + member.bank.a.shape[0]
            self._places[member.key] = slice(start, stop)
            member.shared = self
            start = stop
        self._members = members
        self._stacked: Tensor | None = None
        self._x: tuple[Tensor, int] | None = None
        self._product: Tensor | None = None

    def __call__(self, member: ComposedLinear, x: Tensor) -> Tensor:
        """(…, R) of one member."""
        bypass = torch.is_grad_enabled() or torch.compiler.is_compiling() or x.is_inference()
        if bypass or torch.is_autocast_enabled(x.device.type):
            return F.linear(x, member.bank.a)
        if self._product is None or self._x is None or self._x[0] is not x or self._x[1] != x._version:
            self._x = (x, x._version)
            self._product = F.linear(x, self._weight())
        product = self._product[..., self._places[member.key]]
        if not self.keep and member is self._members[-1]:
            self.clear()
        return product

    def clear(self) -> None:
        """Forget the product and the input that it belongs to."""
        self._x = self._product = None

    def refresh(self) -> None:
        """The members' experts are others now."""
        self.clear()
        self._stacked = None

    def _weight(self) -> Tensor:
        first = self._members[0].bank.a
        if self._stacked is None or self._stacked.device != first.device or self._stacked.dtype != first.dtype:
            self._stacked = torch.cat([member.bank.a for member in self._members])
        return self._stacked


def compose_layer(base: nn.Module, bank: ExpertBank, context: Weigher, key: str) -> ComposedLinear | ComposedConv2d:
    """The composed layer for a Linear or Conv2d."""
    kind = ComposedConv2d if isinstance(base, nn.Conv2d) else ComposedLinear
    return kind(base, bank, context, key)


def weigh(down: Tensor, weights: Tensor, bank: ExpertBank, *, own: bool, axis: int = -1) -> Tensor:
    """g ⊙ (A·x) in the dtype of A·x.

    Args:
        down: (B, …, R), or (B, R, H, W) with ``axis`` −3.
        weights: (b, …, n), or (b, n, h, w), fp32; b divides B.
        own: nobody else needs ``down``: it may be overwritten.
        axis: where the ranks are.
    """
    if down.ndim == 2 and weights.ndim == 3:
        weights = weights.mean(1)
    rows = weights.shape[0]
    shaped = down if rows in (1, down.shape[0]) else down.unflatten(0, (-1, rows))
    if bank.rank:
        shaped = shaped.unflatten(axis, (-1, bank.rank))
        factors = weights.to(down.dtype).unsqueeze(axis)
    else:
        factors = weights.index_select(axis, bank.members).to(down.dtype)
    if own and not torch.is_grad_enabled():
        return shaped.mul_(factors).view(down.shape)
    return (shaped * factors).reshape(down.shape)


def _addmm(y: Tensor, down: Tensor, b: Tensor) -> Tensor:
    """y + down·Bᵀ; into y's own memory where no graph is recorded."""
    if torch.is_grad_enabled() or not y.is_contiguous() or y.dtype != b.dtype or down.dtype != b.dtype:
        return y + F.linear(down, b)
    y.view(-1, y.shape[-1]).addmm_(down.reshape(-1, down.shape[-1]), b.mT)
    return y


def _by_rows(factors: Tensor, like: Tensor) -> Tensor:
    """(b, …) → the rows of ``like``, its dtype; b repeats as [all, all, …]."""
    if like.ndim == 2 and factors.ndim == 3:
        factors = factors.mean(1)
    if factors.shape[0] not in (1, like.shape[0]):
        factors = factors.repeat(like.shape[0] // factors.shape[0], *[1] * (factors.ndim - 1))
    return factors.to(like.dtype)


def _padded(base: nn.Conv2d, x: Tensor) -> Tensor:
    if base.padding_mode == "zeros":
        return x
    return F.pad(x, base._reversed_padding_repeated_twice, mode=base.padding_mode)


def _padding(base: nn.Conv2d) -> Any:
    return base.padding if base.padding_mode == "zeros" else 0


def _pad(base: nn.Conv2d, axis: int) -> int:
    return 0 if isinstance(base.padding, str) else int(base.padding[axis])
