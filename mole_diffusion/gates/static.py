"""Weights that see no input, fixed or learned."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from mole_diffusion.errors import InvalidRequest
from mole_diffusion.functional import renormalise
from mole_diffusion.gates.config import StaticWeights
from mole_diffusion.gates.protocol import BlockSpec, Looks, Run, Sight, Total


class StaticGate(nn.Module):
    """One weight vector per block; see :class:`mole_diffusion.gates.StaticWeights`.

    Attributes:
        table: (M, N), rows in the order of ``names``; a parameter where learnable, else a buffer.
    """

    looks: Looks = "nothing"
    needs_spans = False
    pools = False
    guidance_rows = "own"

    def __init__(self, blocks: Sequence[BlockSpec], experts: int, config: StaticWeights) -> None:
        super().__init__()
        self.config = config
        self.total: Total = "share" if config.redistribute else "free"
        self.names = {block.name: row for row, block in enumerate(blocks)}
        table = torch.tensor([_row(config.weights, block.name, experts) for block in blocks]).reshape(-1, experts)
        _check_names(config.weights, self.names)
        if config.learnable:
            self.table = nn.Parameter(table)
        else:
            self.register_buffer("table", table)

    def static(self, block: BlockSpec, mask: Tensor) -> Tensor | None:
        """(N,) masked weights of a block; shaped like ``mask`` where rows have their own."""
        row = self.table[self.names[block.name]]
        return renormalise(row, mask) if self.config.redistribute else row * mask.to(row.dtype)

    def image(self, block: BlockSpec, sight: Sight | None, run: Run) -> Tensor:
        """(1 or rows, 1, N)."""
        weights = self.static(block, run.mask)
        assert weights is not None
        return weights.expand(weights.shape[0] if weights.ndim == 3 else 1, 1, -1)

    def text(self, block: BlockSpec, sight: Sight, run: Run) -> Tensor | None:
        """As the rest of the block."""
        return None

    def network(self, block: BlockSpec, run: Run) -> Tensor:
        """(1, 1, N)."""
        return self.image(block, None, run)

    def encoder(self, block: BlockSpec, run: Run) -> Tensor:
        """(1, 1, N)."""
        return self.image(block, None, run)

    def gain(self, block: BlockSpec, text: bool) -> Tensor | None:
        """None."""
        return None


def _row(weights: Sequence[float] | Mapping[str, Sequence[float]], block: str, experts: int) -> list[float]:
    row = weights.get(block, weights.get("*")) if isinstance(weights, Mapping) else weights
    if row is None:
        raise InvalidRequest(f"Static weights name no numbers for the block {block!r}: add it, or '*' for all others.")
    if len(row) != experts:
        raise InvalidRequest(f"Expected one static weight for each of {experts} gated experts, got {len(row)}.")
    return list(row)


def _check_names(weights: Sequence[float] | Mapping[str, Sequence[float]], known: Mapping[str, int]) -> None:
    unknown = [name for name in weights if name != "*" and name not in known] if isinstance(weights, Mapping) else []
    if unknown:
        raise InvalidRequest(f"Static weights name a block that no expert touches: {unknown[0]!r}.")
