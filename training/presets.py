"""Settings that fit a GPU, by its memory. A preset only sets defaults: whatever a user gives wins."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Literal

from mole_diffusion.errors import InvalidRequest

Kind = Literal["subject", "gate"]


@dataclass(frozen=True)
class Preset:
    """Defaults for full-size bases.

    Attributes:
        name: what it is called on the command line and on the page.
        memory_gb: the GPU that it is for, in GiB; ``training.memory`` estimates what of it is used.
        trades: what it gives up for fitting, as a sentence.
        common: settings of both tasks.
        subject: settings of subjects alone.
        gate: settings of gates alone.
    """

    name: str
    memory_gb: int
    trades: str
    common: Mapping[str, Any]
    subject: Mapping[str, Any] = field(default_factory=dict)
    gate: Mapping[str, Any] = field(default_factory=dict)

    def settings(self, kind: Kind) -> dict[str, Any]:
        """What it sets for a kind of task, by the names that configurations have in JSON."""
        return {**self.common, **(self.subject if kind == "subject" else self.gate)}


def _of(*presets: Preset) -> Mapping[str, Preset]:
    return MappingProxyType({preset.name: preset for preset in presets})


PRESETS = _of(
    Preset(
        "8gb", 8, "Pictures of 512 pixels, so SDXL learns coarse detail only; rank 4; four passes make one step.",
        {"resolution": 512, "batch": 1, "precision": "bfloat16"},
        {"accumulate": 4, "rank": 4, "targets": "attention", "checkpointing": True, "offload": True},
    ),
    Preset(
        "12gb", 12, "One picture at a time, so four passes make one step; rank 8, attention only.",
        {"resolution": 1024, "batch": 1, "precision": "bfloat16"},
        {"accumulate": 4, "rank": 8, "targets": "attention", "checkpointing": True, "offload": True},
    ),
    Preset(
        "16gb", 16, "One picture at a time, so four passes make one step; rank 16, attention only.",
        {"resolution": 1024, "batch": 1, "precision": "bfloat16"},
        {"accumulate": 4, "rank": 16, "targets": "attention", "checkpointing": True},
    ),
    Preset(
        "24gb", 24, "Activations are computed twice, a third slower; feed-forward and convolutions learn too.",
        {"resolution": 1024, "batch": 2, "precision": "bfloat16"},
        {"accumulate": 2, "rank": 32, "targets": "all", "checkpointing": True},
    ),
    Preset(
        "80gb", 80, "Activations are kept, which is fastest; larger batches need checkpointing again.",
        {"resolution": 1024, "batch": 4, "precision": "bfloat16"},
        {"rank": 32, "targets": "all", "checkpointing": False},
    ),
    Preset(
        "paper-moslora-sdxl", 16, "The recipe of arXiv 2406.11909: a small file of rank 4, 500 steps of four passes.",
        {"base": "sdxl", "resolution": 1024, "batch": 1, "precision": "bfloat16"},
        {
            "adapter": "moslora", "mixer": "orthogonal", "rank": 4, "targets": "attention", "steps": 500,
            "accumulate": 4, "lr": 1e-4, "schedule": "constant", "train_text_encoders": False, "checkpointing": True,
        },
    ),
)  # fmt: skip
"""Presets by name. Estimates for SDXL; SD 2.1 takes less."""


def preset(name: str) -> Preset:
    """The preset of that name. Raises InvalidRequest."""
    if name not in PRESETS:
        raise InvalidRequest(f"Expected a preset out of {', '.join(PRESETS)}, got {name!r}.")
    return PRESETS[name]


def advice(batch: int, resolution: int, memory_gb: float | None) -> str:
    """What to do where a batch did not fit into ``memory_gb`` of a device (None: unknown), as a sentence."""
    by_size = sorted((item for item in PRESETS.values() if "base" not in item.common), key=lambda item: item.memory_gb)
    lighter = [
        item.name
        for item in by_size
        if memory_gb is not None
        and item.memory_gb < memory_gb + 1
        and item.common["batch"] * item.common["resolution"] ** 2 < batch * resolution**2
    ]
    return (
        f"A batch of {batch} at {resolution} pixels does not fit into the memory of this device: choose a smaller "
        f"batch or resolution, or the preset {lighter[-1] if lighter else by_size[0].name}."
    )
