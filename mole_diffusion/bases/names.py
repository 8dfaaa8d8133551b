"""Names of the bases, and where the demo's files are; imports nothing, so that help and errors come at once."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

BASES: Mapping[str, str] = MappingProxyType(
    {
        "demo": "Demo world (ships with this project)",
        "sd21": "Stable Diffusion 2.1 (768 px)",
        "sd21-base": "Stable Diffusion 2.1 base (512 px)",
        "sdxl": "Stable Diffusion XL base 1.0",
    }
)
"""Names that ``get_base`` knows, with their titles."""


def assets_dir() -> Path:
    """Folder of the demo base, its experts and subjects; the environment variable MOLE_ASSETS names another one."""
    override = os.environ.get("MOLE_ASSETS")
    return Path(override).expanduser().resolve() if override else Path(__file__).resolve().parents[2] / "assets"
