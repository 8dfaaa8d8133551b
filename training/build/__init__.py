"""From settings to a task that is ready to run: base, experts, pictures, composition. One file per task."""

from training.build.base import device_asked_for, load_base
from training.build.experts import GateExpert, find_expert, phrase_of
from training.build.gate import build_gate
from training.build.router import build_router
from training.build.subject import build_subject

__all__ = [
    "GateExpert",
    "build_gate",
    "build_router",
    "build_subject",
    "device_asked_for",
    "find_expert",
    "load_base",
    "phrase_of",
]
