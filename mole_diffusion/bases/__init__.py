"""Base models: ``get_base(name)`` gives one object that answers every question about a base."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mole_diffusion.bases.base import Base
    from mole_diffusion.bases.conditioning import Conditioning
    from mole_diffusion.bases.device import Placement, choose_placement
    from mole_diffusion.bases.names import BASES, assets_dir
    from mole_diffusion.bases.registry import get_base, register_local
    from mole_diffusion.bases.tokenizer import clip_tokenizer

__all__ = [
    "BASES",
    "Base",
    "Conditioning",
    "Placement",
    "assets_dir",
    "choose_placement",
    "clip_tokenizer",
    "get_base",
    "register_local",
]

_HOME = {
    "BASES": "names",
    "assets_dir": "names",
    "Base": "base",
    "Conditioning": "conditioning",
    "Placement": "device",
    "choose_placement": "device",
    "clip_tokenizer": "tokenizer",
}


def __getattr__(name: str) -> Any:
    """Each name is imported when it is first used."""
    from importlib import import_module

    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME.get(name, 'registry')}"), name)
