"""From settings to the gate module."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mole_diffusion.errors import InvalidRequest
from mole_diffusion.gates.config import AnyGate, GateConfig, RouterConfig, StaticWeights, TriggerSpans
from mole_diffusion.gates.learned import LearnedGates
from mole_diffusion.gates.router import RouterGates
from mole_diffusion.gates.schedule import ScheduleGate
from mole_diffusion.gates.span import SpanGate
from mole_diffusion.gates.static import StaticGate
from mole_diffusion.gates.stepwise import schedule_for

if TYPE_CHECKING:
    from mole_diffusion.plan import Plan


def build_gate(plan: Plan, config: AnyGate) -> LearnedGates | StaticGate | SpanGate | RouterGates | ScheduleGate:
    """The gate module for a plan.

    Raises:
        InvalidRequest: the settings contradict the experts.
    """
    count = len(plan.gated)
    if isinstance(config, StaticWeights):
        return StaticGate(plan.blocks, count, config)
    if isinstance(config, GateConfig):
        return LearnedGates(plan.blocks, count, config)
    if isinstance(config, RouterConfig):
        return RouterGates(plan.sizes, config)
    if not isinstance(config, TriggerSpans):
        return ScheduleGate(plan.blocks, schedule_for(plan, config))
    triggers = [expert.trigger for expert in plan.gated]
    if not all(triggers):
        nameless = next(expert.name for expert in plan.gated if not expert.trigger)
        raise InvalidRequest(f"Trigger spans need every expert's trigger words; {nameless!r} has none.")
    if len({str(trigger).lower() for trigger in triggers}) < count:
        raise InvalidRequest("Two experts have the same trigger words, so trigger spans cannot tell them apart.")
    return SpanGate(count, config)
