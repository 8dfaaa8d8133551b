"""Adapters that are trained here and leave as plain LoRAs."""

from __future__ import annotations

from mole_diffusion.adapters.config import MoSLoraConfig
from mole_diffusion.adapters.fold import fold, fold_modules, fold_state, load_moslora, save_moslora
from mole_diffusion.adapters.mixer import MIXER_INITS, fold_down, init_mixer
from mole_diffusion.adapters.moslora import add_moslora, register_moslora

__all__ = [
    "MIXER_INITS",
    "MoSLoraConfig",
    "add_moslora",
    "fold",
    "fold_down",
    "fold_modules",
    "fold_state",
    "init_mixer",
    "load_moslora",
    "register_moslora",
    "save_moslora",
]
