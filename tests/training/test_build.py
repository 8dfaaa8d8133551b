"""What is refused before a base is loaded."""

from __future__ import annotations

from pathlib import Path

import pytest

from mole_diffusion import Expert
from mole_diffusion.errors import InvalidRequest
from training.build import GateExpert, build_gate
from training.tasks.gate import GateTrainingConfig


def test_the_phrase_that_two_experts_share_is_named(tmp_path: Path) -> None:
    experts = [GateExpert(Expert("any", {}), phrase) for phrase in ("zwx cat", "zwx robot", "ZWX Robot")]
    with pytest.raises(InvalidRequest, match="both called “zwx robot”"):
        build_gate(GateTrainingConfig("demo"), experts, tmp_path, print)
