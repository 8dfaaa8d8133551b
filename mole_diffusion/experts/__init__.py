"""Experts: frozen adapters in one canonical form, read from the files that people have."""

from __future__ import annotations

from mole_diffusion.experts.canonical import COMPONENTS, MAX_RANK, Embeddings, Expert, LowRank, Role, content_hash
from mole_diffusion.experts.forecast import Forecast, Overlap, forecast_collisions
from mole_diffusion.experts.inspect import Inspection, check_fits, inspect_file
from mole_diffusion.experts.load import content_sha256
from mole_diffusion.experts.safefile import Header, read_header, read_tensors
from mole_diffusion.experts.save import save_expert

__all__ = [
    "COMPONENTS",
    "MAX_RANK",
    "Embeddings",
    "Expert",
    "Forecast",
    "Header",
    "Inspection",
    "LowRank",
    "Overlap",
    "Role",
    "check_fits",
    "content_hash",
    "content_sha256",
    "forecast_collisions",
    "inspect_file",
    "read_header",
    "read_tensors",
    "save_expert",
]
