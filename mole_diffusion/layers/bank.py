"""The experts of one module, stacked: A = [A_1; …; A_n], B = [s_1·B_1 … s_n·B_n]."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from mole_diffusion.experts.canonical import LowRank


class Padding(LowRank):
    """Zeros in the place of an expert that does not touch this module."""


class ExpertBank(nn.Module):
    """Stacked low-rank pairs; R = Σ r_i over the n experts that touch this module.

    Attributes:
        a: (R, d_in) or (R, c_in, k, k).
        b: (d_out, R), scales folded in; rows of a DoRA expert are scaled by its c_i.
        owners: (R,) long: the column of each rank's expert in the gate's weights.
        chosen: (n,) long: the columns that occur, in stacking order.
        members: (R,) long: the place of each rank's expert in ``chosen``.
        present: (n,) bool, False for :class:`Padding`.
        stretch: (n, d_out): c_i − 1 of DoRA experts, 0 of others; None where none is DoRA. With
            c_i = m_i / ‖W + s_i·B_i·A_i‖ per output (arXiv 2402.09353), expert i alone is c_i ⊙ (W + s_i·B_i·A_i).
        columns: ``chosen`` as numbers.
        ranks: r_i in stacking order.
        rank: r where all ranks are equal, else 0.
    """

    a: Tensor
    b: Tensor
    owners: Tensor
    chosen: Tensor
    members: Tensor
    present: Tensor
    stretch: Tensor | None

    def __init__(self, pairs: Mapping[int, LowRank], weight: Tensor) -> None:
        """Stack ``pairs`` (column → pair, already shaped for the module) on the device and in the dtype of ``weight``,
        the base's own."""
        super().__init__()
        self.columns = tuple(pairs)
        self.ranks = tuple(pair.rank for pair in pairs.values())
        self.rank = self.ranks[0] if len(set(self.ranks)) == 1 else 0
        device = weight.device
        stretches = [_stretch(pair, weight) for pair in pairs.values()]
        stacked_b = [
            pair.b.to(device, torch.float32) * pair.scale * (1.0 if c is None else (1.0 + c).unsqueeze(1))
            for pair, c in zip(pairs.values(), stretches, strict=True)
        ]
        stacked_a = [pair.a.to(device, torch.float32) for pair in pairs.values()]
        owners = [column for column, pair in pairs.items() for _ in range(pair.rank)]
        members = [place for place, rank in enumerate(self.ranks) for _ in range(rank)]
        self._keep("a", torch.cat(stacked_a).to(weight.dtype))
        self._keep("b", torch.cat(stacked_b, 1).to(weight.dtype))
        self._keep("owners", torch.tensor(owners, device=device))
        self._keep("chosen", torch.tensor(self.columns, device=device))
        self._keep("members", torch.tensor(members, device=device))
        self._keep("present", torch.tensor([not isinstance(p, Padding) for p in pairs.values()], device=device))
        zero = torch.zeros(weight.shape[0], device=device)
        dora = any(c is not None for c in stretches)
        self._keep("stretch", torch.stack([zero if c is None else c for c in stretches]) if dora else None)

    def pick(self, weights: Tensor, axis: int = -1) -> Tensor:
        """This module's columns of gate weights, (…, columns, …) → (…, n, …) along ``axis``."""
        if self.columns == tuple(range(weights.shape[axis])):
            return weights
        return weights.index_select(axis, self.chosen)

    def spread(self, weights: Tensor) -> Tensor:
        """One weight per expert (…, n) → one per rank (…, R)."""
        return weights.index_select(-1, self.members)

    def delta(self, weights: Tensor, base: Tensor) -> Tensor:
        """What the experts add to the base's weight, in fp32, shaped like it.

        Args:
            weights: (…, n) one number per expert of this module.
            base: the module's own weight; only DoRA experts look at it.
        """
        gates = self.spread(weights.to(self.b.device, torch.float32)).unsqueeze(-2)
        product = ((self.b.float() * gates) @ self.a.float().flatten(1)).unflatten(-1, self.a.shape[1:])
        if self.stretch is None:
            return product
        stretch = weights.to(self.b.device, torch.float32) @ self.stretch.float()
        return product + stretch.reshape(*stretch.shape, *[1] * (base.ndim - 1)) * base.float()

    def added(self, weights: Tensor, base: Tensor, room: Tensor | None = None) -> Tensor:
        """``base`` + :meth:`delta` of one vector of weights (n,), in as few passes as there are.

        ``room``, shaped like ``base``, may be overwritten and returned: fresh memory for every weight costs some
        percent of a call.
        """
        if self.stretch is not None or base.dtype != torch.float32:
            return base + self.delta(weights, base)
        out = None if room is None else room.flatten(1)
        return torch.addmm(base.flatten(1), self.b * self.spread(weights), self.a.flatten(1), out=out).view_as(base)

    def _keep(self, name: str, value: Tensor | None) -> None:
        self.register_buffer(name, value, persistent=False)


def _stretch(pair: LowRank, weight: Tensor) -> Tensor | None:
    """c − 1 of a DoRA expert, (d_out,) fp32; None of any other."""
    if pair.magnitude is None:
        return None
    whole = weight.float() + pair.delta().to(weight.device)
    norms = whole.flatten(1).norm(dim=1)
    tiny = torch.finfo(torch.float32).tiny
    return pair.magnitude.to(weight.device, torch.float32).flatten() / norms.clamp_min(tiny) - 1.0
