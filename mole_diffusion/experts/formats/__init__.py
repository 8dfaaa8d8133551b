"""Foreign LoRA layouts, one small file each.

A layout is added by writing a module with ``NAME``, ``matches`` and ``convert`` and naming it in ``FORMATS``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

from torch import Tensor

from mole_diffusion.experts.canonical import LowRank
from mole_diffusion.experts.names import Resolver
from mole_diffusion.experts.safefile import Header


@dataclass(frozen=True)
class Converted:
    """What a layout understood of a file.

    Attributes:
        modules: canonical key → low-rank pair.
        unmatched: tensor keys that it could not place, by name.
        alphas: canonical key → α, for modules whose file states one.
        errors: canonical key → relative error ‖ΔW − pair‖/‖ΔW‖, for modules whose pair is only the nearest one.
    """

    modules: Mapping[str, LowRank]
    unmatched: tuple[str, ...] = ()
    alphas: Mapping[str, float] = field(default_factory=dict)
    errors: Mapping[str, float] = field(default_factory=dict)


class Format(Protocol):
    """One layout."""

    @property
    def NAME(self) -> str:
        """What the layout is called."""
        ...

    def matches(self, header: Header) -> bool:
        """Does the file use this layout? Decided by key names alone."""
        ...

    def convert(self, tensors: Mapping[str, Tensor], header: Header, resolver: Resolver | None = None) -> Converted:
        """Tensors by name → canonical modules."""
        ...


def formats() -> tuple[Format, ...]:
    """Every layout, the most specific first."""
    from mole_diffusion.experts.formats import diffusers, kohya

    return (kohya, diffusers)


def find_format(header: Header) -> Format | None:
    """The layout of a file, None where no layout knows it."""
    return next((layout for layout in formats() if layout.matches(header)), None)
