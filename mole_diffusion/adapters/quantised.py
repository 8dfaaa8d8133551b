"""MoSLoRA on 4-bit bases (QMoSLoRA in arXiv 2406.11909); imported only where bitsandbytes is installed."""

from __future__ import annotations

from bitsandbytes.nn import Linear4bit as LINEAR_4BIT  # pyright: ignore[reportMissingImports]
from peft.tuners.lora.bnb import Linear4bit

from mole_diffusion.adapters.layers import MixerLayer

__all__ = ["LINEAR_4BIT", "MixerLinear4bit"]


class MixerLinear4bit(MixerLayer, Linear4bit):
    """A 4-bit linear module with MoSLoRA adapters in full precision."""

    packed = True
