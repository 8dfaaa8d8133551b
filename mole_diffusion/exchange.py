"""Other experts in the places of those that are attached: numbers change, modules and addresses stay."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn

from mole_diffusion.errors import InvalidRequest
from mole_diffusion.experts.canonical import LowRank
from mole_diffusion.layers import ComposedConv2d, ComposedLinear, ExpertBank, Padding
from mole_diffusion.plan import Plan

_LEAST = 4


def padded(plan: Plan) -> Plan:
    """The plan with every expert in every module and at one rank, the next power of two, so that any set of as many
    experts on the same modules and up to this rank has tensors of the same shapes.

    Zero rows and columns are added, which change no output.
    """
    top = max(pair.rank for pairs in plan.pairs.values() for pair in pairs.values())
    rank = max(_LEAST, 1 << (top - 1).bit_length())
    count = len(plan.columns)
    pairs = {key: {column: _pad(found, column, rank) for column in range(count)} for key, found in plan.pairs.items()}
    return replace(plan, pairs=pairs)


def exchange(layers: Mapping[str, ComposedLinear | ComposedConv2d], plan: Plan) -> bool:
    """Put the plan's experts into the banks of attached layers.

    Returns:
        False, and nothing has changed, where a module, a rank or a number of experts differs.
    """
    if set(layers) != set(plan.pairs):
        return False
    banks: list[tuple[ExpertBank, ExpertBank]] = []
    for key, pairs in plan.pairs.items():
        layer = layers[key]
        weight = layer.base.weight
        assert isinstance(weight, Tensor)
        fits = layer.bank.columns == tuple(pairs) and layer.bank.ranks == tuple(pair.rank for pair in pairs.values())
        if not fits:
            return False
        banks.append((layer.bank, ExpertBank(pairs, weight)))
    if any((old.stretch is None) != (new.stretch is None) for old, new in banks):
        return False
    for old, new in banks:
        take_over(old, new)
    for layer in layers.values():
        if layer.shared is not None:
            layer.shared.refresh()
    return True


@torch.no_grad()
def take_over(old: nn.Module, new: nn.Module) -> bool:
    """Copy the parameters and buffers of ``new`` into ``old``; False, and nothing has changed, if shapes differ."""
    ours, theirs = (dict([*m.named_parameters(), *m.named_buffers()]) for m in (old, new))
    if {name: tensor.shape for name, tensor in ours.items()} != {name: t.shape for name, t in theirs.items()}:
        return False
    for name, tensor in ours.items():
        tensor.copy_(theirs[name])
    return True


@torch.no_grad()
def carry_over(new: nn.Module, old: nn.Module) -> None:
    """Copy every parameter of ``old`` into the one of the same name in ``new``; others stay as they are.

    Raises:
        InvalidRequest: one of the same name has another shape.
    """
    known = dict(old.named_parameters())
    for name, parameter in new.named_parameters():
        if name in known and known[name].shape != parameter.shape:
            raise InvalidRequest(
                f"The router at {name} has the shape {tuple(known[name].shape)}, the new one {tuple(parameter.shape)}: "
                "keep its rank, or compose anew."
            )
    for name, parameter in new.named_parameters():
        if name in known:
            parameter.copy_(known[name])


def _pad(found: Mapping[int, LowRank], column: int, rank: int) -> LowRank:
    pair = found.get(column)
    like = next(iter(found.values())) if pair is None else pair
    a = like.a.new_zeros(rank, *like.a.shape[1:])
    b = like.b.new_zeros(like.b.shape[0], rank)
    if pair is None:
        return Padding(a, b)
    a[: pair.rank], b[:, : pair.rank] = pair.a, pair.b
    return LowRank(a, b, pair.scale, pair.magnitude)
