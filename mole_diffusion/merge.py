"""Static weights cost nothing: put them into the base's own weights, and take them out bit for bit."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from mole_diffusion.errors import InvalidRequest
from mole_diffusion.experts.canonical import LowRank
from mole_diffusion.gates.protocol import Gate
from mole_diffusion.layers import ComposedConv2d, ComposedLinear
from mole_diffusion.plan import Plan


def column_weights(plan: Plan, gate: Gate, mask: Tensor, always_on: list[bool]) -> dict[str, Tensor]:
    """Block → (columns,) weights on the CPU.

    Raises:
        InvalidRequest: the gate looks at its input.
    """
    table = {}
    for block in plan.blocks:
        weights = gate.static(block, mask)
        if weights is None:
            raise InvalidRequest(
                "Only static weights can be merged or collapsed: this gate gives other weights for every input."
            )
        table[block.name] = torch.cat([weights.detach().float().cpu(), torch.tensor(always_on, dtype=torch.float32)])
    return table


class Merged:
    """Weights with the experts added; :meth:`undo` copies the originals back."""

    @torch.no_grad()
    def __init__(
        self, layers: Mapping[str, ComposedLinear | ComposedConv2d], plan: Plan, weights: Mapping[str, Tensor]
    ) -> None:
        self._originals: list[tuple[Tensor, Tensor]] = []
        try:
            for key, layer in layers.items():
                self._merge(layer, weights[plan.sites[key].block.name])
        except BaseException:  # out of memory, an interrupt: never leave a base half merged
            self.undo()
            raise

    def _merge(self, layer: ComposedLinear | ComposedConv2d, row: Tensor) -> None:
        base = layer.base
        assert isinstance(base, nn.Module)
        weight = base.weight
        assert isinstance(weight, Tensor)
        merged = (weight.float() + layer.bank.delta(layer.bank.pick(row.to(weight.device)), weight)).to(weight.dtype)
        self._originals.append((weight, weight.detach().clone()))
        weight.copy_(merged)

    @torch.no_grad()
    def undo(self) -> None:
        """Restore every weight bit for bit."""
        for weight, original in self._originals:
            weight.copy_(original)
        self._originals = []


def collapse(plan: Plan, weights: Mapping[str, Tensor]) -> dict[str, LowRank]:
    """One ordinary LoRA of rank Σ r_i that equals the static composition.

    Raises:
        InvalidRequest: an expert is DoRA, whose change depends on the base.
    """
    modules = {}
    for key, pairs in plan.pairs.items():
        if any(pair.magnitude is not None for pair in pairs.values()):
            raise InvalidRequest(
                f"An expert is DoRA (at {key}): its change is no low-rank pair, so it cannot become part of one LoRA. "
                "Merge the composition into the base instead."
            )
        row = weights[plan.sites[key].block.name]
        up = [pair.b.float() * (pair.scale * float(row[column])) for column, pair in pairs.items()]
        modules[key] = LowRank(torch.cat([pair.a.float() for pair in pairs.values()]), torch.cat(up, 1))
    return modules
