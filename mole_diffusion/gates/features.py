"""What learned gates can look at besides the hidden state."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from mole_diffusion.layers.bank import ExpertBank

_FLOOR = 1e-8


def energies(down: Tensor, bank: ExpertBank, columns: int) -> Tensor:
    """Centred log ‖s_i·B_i·A_i·x‖² of every expert, from A·x and the Gram matrix BᵀB.

    The norm does not change with the basis of A and B, and centring removes the norm of x.

    Args:
        down: A·x, (rows, L, R).
        bank: the experts of the module; DoRA experts count with their low-rank part.
        columns: N; experts that are absent here get 0, as much as the average.

    Returns:
        (rows, L, N) fp32.
    """
    down = down.float()
    b = bank.b.float()
    same = bank.members.unsqueeze(0) == bank.members.unsqueeze(1)
    parts = (down @ ((b.mT @ b) * same)) * down
    squares = parts.new_zeros(*parts.shape[:-1], len(bank.ranks)).index_add(-1, bank.members, parts)
    there = bank.present.to(squares.dtype)
    logs = (squares.clamp_min(0.0) + _FLOOR).log() * there
    centred = (logs - logs.sum(-1, keepdim=True) / there.sum()) * there
    found = centred.new_zeros(*centred.shape[:-1], max(columns, bank.columns[-1] + 1))
    return found.index_add(-1, bank.chosen, centred)[..., :columns]


def concatenated(outputs: list[Tensor]) -> Tensor:
    """E_Ω = Normalization(E_0 ⊕ … ⊕ E_{N−1}) (Eq. 9); the paper leaves the normalisation open, this is LayerNorm over
    each expert's channels, so that no expert wins by the size of its output.

    Args:
        outputs: N tensors (rows, L, d).

    Returns:
        (rows, L, N·d).
    """
    return torch.cat([F.layer_norm(output.float(), output.shape[-1:]) for output in outputs], -1)
