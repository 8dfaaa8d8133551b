"""Static weights cost nothing: put them into the base's own weights, and take them out bit for bit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from mole_diffusion.errors import InvalidRequest
from mole_diffusion.experts.canonical import LowRank
from mole_diffusion.gates.protocol import Gate
from mole_diffusion.layers import ComposedConv2d, ComposedLinear
from mole_diffusion.plan import Plan
from mole_diffusion.trace import Trace


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
                "Only static weights can be merged or collapsed: this gate gives other weights for every input or step."
            )
        table[block.name] = torch.cat([weights.detach().float().cpu(), torch.tensor(always_on, dtype=torch.float32)])
    return table


def trace_weights(
    plan: Plan, traces: Sequence[Trace], unseen: Mapping[str, Tensor], always_on: list[bool]
) -> dict[str, Tensor]:
    """Block → (columns,) weights on the CPU: what gates said on average over all steps of all traces.

    Text-token gates are listed as "<block>:text"; what no trace holds (text encoders, blocks without a
    gate) gets ``unseen``, block → (N,).

    Raises:
        InvalidRequest: the traces are empty, or belong to other experts.
    """
    names = tuple(expert.name for expert in plan.gated)
    if not traces or any(not trace.weights for trace in traces):
        raise InvalidRequest(
            "These gates give other weights for every input, and nothing was recorded to average: make some pictures "
            "first, and hand over composition.trace() of each."
        )
    if any(trace.names != names for trace in traces):
        raise InvalidRequest(f"A trace of other experts was given: expected {', '.join(names)}.")
    always = torch.tensor(always_on, dtype=torch.float32)
    table = {block.name: torch.cat([unseen[block.name].float().cpu(), always]) for block in plan.blocks}
    for name in {name for trace in traces for name in trace.weights}:
        steps = torch.tensor([row for trace in traces for row in trace.weights.get(name, [])])
        table[name] = torch.cat([steps.mean(0), always])
    return table


class Merged:
    """Weights with the experts added; :meth:`undo` puts the very same parameters back.

    Modules get parameters of their own, since a weight may be tied to another one, as a head's to the embedding.
    """

    @torch.no_grad()
    def __init__(
        self, layers: Mapping[str, ComposedLinear | ComposedConv2d], plan: Plan, weights: Mapping[str, Tensor]
    ) -> None:
        self._originals: list[tuple[nn.Module, Tensor]] = []
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
        self._originals.append((base, weight))
        base.weight = nn.Parameter(merged, requires_grad=False)

    def undo(self) -> None:
        """Restore every weight bit for bit."""
        for module, original in self._originals:
            module.weight = original
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
        site = plan.sites[key]
        row = weights[site.block.name]
        if site.sees == "text":
            row = weights.get(f"{site.block.name}:text", row)
        up = [pair.b.float() * (pair.scale * float(row[column])) for column, pair in pairs.items()]
        modules[key] = LowRank(torch.cat([pair.a.float() for pair in pairs.values()]), torch.cat(up, 1))
    return modules
