"""Which schedule a config asks for."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mole_diffusion.gates.composite import Apart
from mole_diffusion.gates.config import KLora, LoraComposite, LoraSwitch, ScheduledWeights
from mole_diffusion.gates.klora import TopK
from mole_diffusion.gates.schedule import Keyframes, Schedule
from mole_diffusion.gates.switch import Turns

if TYPE_CHECKING:
    from mole_diffusion.plan import Plan


def schedule_for(plan: Plan, config: ScheduledWeights | LoraSwitch | LoraComposite | KLora) -> Schedule:
    """The schedule of a gate that follows the steps.

    Raises:
        InvalidRequest: the settings contradict the experts.
    """
    count = len(plan.gated)
    if isinstance(config, ScheduledWeights):
        return Keyframes(plan.blocks, count, config)
    if isinstance(config, LoraSwitch):
        return Turns(count, config)
    if isinstance(config, LoraComposite):
        return Apart(count, config)
    return TopK(plan, config)
