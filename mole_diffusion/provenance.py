"""How a picture was made: the record that lies inside its file and makes it again."""

from __future__ import annotations

import hashlib
import json
from typing import TYPE_CHECKING, Any

import torch

from mole_diffusion.gates.config import gate_to_json

if TYPE_CHECKING:
    from mole_diffusion.composition import Composition


def describe_composition(composition: Composition) -> dict[str, Any]:
    """Experts by name and content hash, which of them were masked, the gate's settings and a hash of its weights."""
    return {
        "experts": [
            {"name": expert.name, "sha256": expert.sha256, "trigger": expert.trigger, "role": expert.role}
            for expert in composition.experts
        ],
        "masked": list(composition.masked),
        "gate": json.loads(json.dumps(gate_to_json(composition.config))),
        "gate_sha256": _state_hash(composition),
    }


def _state_hash(composition: Composition) -> str:
    digest = hashlib.sha256()
    for name, value in sorted(composition.state_dict().items()):
        digest.update(f"{name}|{tuple(value.shape)}|".encode())
        digest.update(value.detach().to("cpu", torch.float32).contiguous().numpy().tobytes())
    return digest.hexdigest()
