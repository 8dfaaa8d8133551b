"""MoLE Diffusion: compose frozen LoRAs with learned gates (arXiv 2404.13628)."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mole_diffusion.composition import Composition, compose
    from mole_diffusion.experts import Expert
    from mole_diffusion.experts.combine import combine
    from mole_diffusion.gates import (
        GateConfig,
        KLora,
        LoraComposite,
        LoraSwitch,
        RouterConfig,
        ScheduledWeights,
        StaticWeights,
        TriggerSpans,
    )
    from mole_diffusion.gates.router_file import load_router
    from mole_diffusion.persist import load_composition

_HOME = {
    "Expert": "experts",
    "GateConfig": "gates",
    "KLora": "gates",
    "LoraComposite": "gates",
    "LoraSwitch": "gates",
    "RouterConfig": "gates",
    "ScheduledWeights": "gates",
    "StaticWeights": "gates",
    "TriggerSpans": "gates",
    "combine": "experts.combine",
    "Composition": "composition",
    "compose": "composition",
    "load_composition": "persist",
    "load_router": "gates.router_file",
}
__all__ = [
    "Composition",
    "Expert",
    "GateConfig",
    "KLora",
    "LoraComposite",
    "LoraSwitch",
    "RouterConfig",
    "ScheduledWeights",
    "StaticWeights",
    "TriggerSpans",
    "combine",
    "compose",
    "load_composition",
    "load_router",
]


def __getattr__(name: str) -> Any:
    """Import a public name on first use, so that ``import mole_diffusion`` costs nothing."""
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
