"""Gates: what gives each expert its weight. One per file, one protocol."""

from __future__ import annotations

from mole_diffusion.gates.block import BlockGate
from mole_diffusion.gates.config import (
    GateConfig,
    KLora,
    LoraComposite,
    LoraSwitch,
    RouterConfig,
    ScheduledWeights,
    StaticWeights,
    TriggerSpans,
    learned_static,
    nla,
    weighted_sum,
)
from mole_diffusion.gates.learned import LearnedGates
from mole_diffusion.gates.protocol import BlockSpec, Gate, Run, Sight
from mole_diffusion.gates.router import RouterGates, TrainedRouter
from mole_diffusion.gates.router_file import load_router, save_router
from mole_diffusion.gates.schedule import ScheduleGate
from mole_diffusion.gates.span import SpanGate
from mole_diffusion.gates.static import StaticGate

__all__ = [
    "BlockGate",
    "BlockSpec",
    "Gate",
    "GateConfig",
    "KLora",
    "LearnedGates",
    "LoraComposite",
    "LoraSwitch",
    "RouterConfig",
    "RouterGates",
    "Run",
    "ScheduleGate",
    "ScheduledWeights",
    "Sight",
    "SpanGate",
    "StaticGate",
    "StaticWeights",
    "TrainedRouter",
    "TriggerSpans",
    "learned_static",
    "load_router",
    "nla",
    "save_router",
    "weighted_sum",
]
