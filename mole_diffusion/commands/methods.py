"""Composition without trained gates: from a method's name on a command line to experts and a gate."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from mole_diffusion.errors import InvalidRequest

if TYPE_CHECKING:
    from mole_diffusion.composition import Composition
    from mole_diffusion.experts import Expert
    from mole_diffusion.gates.config import AnyGate

COMBINED = (
    "cat", "linear", "svd", "ties", "ties_svd", "dare_linear", "dare_linear_svd", "dare_ties", "dare_ties_svd",
    "magnitude_prune", "magnitude_prune_svd",
)  # fmt: skip
"""Methods that melt all experts into one before the run."""
METHODS = ("nla", "sum", "spans", "switch", "composite", "klora", *COMBINED)
_UNWEIGHTED = ("spans", "klora")
_FLOOR = 0.01


def choose(
    experts: Sequence[Expert], method: str, weights: Sequence[float] | None = None
) -> tuple[list[Expert], AnyGate]:
    """What a method composes, and by which gate; accelerators stay beside everything.

    Args:
        weights: one per expert that is no accelerator: factors of a sum, shares of nla, strengths elsewhere.

    Raises:
        InvalidRequest: no experts, or weights that the method cannot use.
    """
    gated = [expert for expert in experts if expert.role != "accelerator"]
    if not gated:
        raise InvalidRequest(f"The method {method} needs experts: name them with --expert.")
    if weights is not None and method in _UNWEIGHTED:
        raise InvalidRequest(f"The method {method} finds its weights itself: leave --weights out, or choose sum.")
    if weights is not None and len(weights) != len(gated):
        names = ", ".join(expert.name for expert in gated)
        raise InvalidRequest(f"Expected one weight for each of {len(gated)} experts ({names}), got {len(weights)}.")
    if method not in COMBINED:
        return list(experts), _gate(method, len(gated), weights)

    from mole_diffusion.experts.combine import combine
    from mole_diffusion.gates import weighted_sum

    one = combine(gated, weights, method)  # pyright: ignore[reportArgumentType]
    return [one, *(expert for expert in experts if expert.role == "accelerator")], weighted_sum(1)


def parse_regions(texts: Sequence[str]) -> dict[str, tuple[float, ...]]:
    """``NAME=left,top,right,bottom`` of each expert.

    Raises:
        InvalidRequest: malformed, or a name comes twice.
    """
    regions: dict[str, tuple[float, ...]] = {}
    for text in texts:
        name, _, box = text.rpartition("=")
        try:
            sides = tuple(float(side) for side in box.split(","))
        except ValueError:
            sides = ()
        if not name or len(sides) != 4:
            raise InvalidRequest(f"A region is NAME=left,top,right,bottom with numbers from 0 to 1, got {text!r}.")
        if name in regions:
            raise InvalidRequest(f"{name!r} has two regions: give one.")
        regions[name] = sides
    return regions


def check_regions(regions: Mapping[str, object], method: str | None, experts: bool) -> None:
    """Refuse regions that nobody can have, before a base is loaded; ``experts``: are there any?

    Raises:
        InvalidRequest: says why.
    """
    if regions and not experts:
        raise InvalidRequest("Regions need experts: name them with --expert.")
    if regions and method in COMBINED:
        raise InvalidRequest(
            f"The method {method} makes one LoRA of all experts, so they cannot have regions of their own: choose "
            "sum, switch or composite."
        )


def place(composition: Composition | None, regions: Mapping[str, tuple[float, ...]]) -> None:
    """Put experts into their regions: cut at the edge where weights are each expert's own, drawn to it elsewhere.

    Raises:
        InvalidRequest: an unknown name, or a box outside 0…1.
    """
    if regions and composition is not None:
        composition.place(regions, floor=0.0 if composition.gate.total == "free" else _FLOOR)


def _gate(method: str, count: int, weights: Sequence[float] | None) -> AnyGate:
    from mole_diffusion.gates import (
        KLora,
        LoraComposite,
        LoraSwitch,
        StaticWeights,
        TriggerSpans,
        weighted_sum,
    )

    factors = (1.0,) * count if weights is None else tuple(weights)
    if method == "nla" and not sum(factors) > 0:
        raise InvalidRequest(
            f"Weights of nla are shares and need a sum above 0, got {weights}; the method sum does not."
        )
    gates = {
        "nla": lambda: StaticWeights(tuple(factor / sum(factors) for factor in factors)),
        "sum": lambda: weighted_sum(factors),
        "spans": TriggerSpans,
        "switch": lambda: LoraSwitch(weights=factors),
        "composite": lambda: LoraComposite(weights=factors),
        "klora": KLora,
    }
    return gates[method]()
