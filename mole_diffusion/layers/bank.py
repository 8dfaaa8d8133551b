"""The experts of one module, stacked: A = [A_1; …; A_n], B = [s_1·B_1 … s_n·B_n]."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from mole_diffusion.experts.canonical import LowRank


class ExpertBank(nn.Module):
    """Stacked low-rank pairs; R = Σ r_i over the experts that touch this module.

    Attributes:
        a: (R, d_in) or (R, c_in, k, k).
        b: (d_out, R), scales folded in.
        owners: (R,) long: the column of each rank's expert in the gate's weights.
        columns: the columns that occur, in stacking order.
        ranks: their ranks.
    """

    a: Tensor
    b: Tensor
    owners: Tensor

    def __init__(self, pairs: Mapping[int, LowRank], like: Tensor) -> None:
        """Stack ``pairs`` (column → pair, already shaped for the module) on the device and in the dtype of ``like``."""
        super().__init__()
        self.columns = tuple(pairs)
        self.ranks = tuple(pair.rank for pair in pairs.values())
        stacked_a = torch.cat([pair.a.float() for pair in pairs.values()])
        stacked_b = torch.cat([pair.b.float() * pair.scale for pair in pairs.values()], 1)
        owners = [column for column, pair in pairs.items() for _ in range(pair.rank)]
        self.register_buffer("a", stacked_a.to(like.device, like.dtype), persistent=False)
        self.register_buffer("b", stacked_b.to(like.device, like.dtype), persistent=False)
        self.register_buffer("owners", torch.tensor(owners, device=like.device), persistent=False)

    def delta(self, weights: Tensor) -> Tensor:
        """Σ w_i · s_i · B_i · A_i in fp32, shaped like the module's weight.

        Args:
            weights: (columns,) one number per column of the gate.
        """
        gates = weights.to(self.b.device, torch.float32)[self.owners]
        product = (self.b.float() * gates) @ self.a.float().flatten(1)
        return product.reshape(self.b.shape[0], *self.a.shape[1:])
