"""Frozen layers with a bank of stacked experts beside them."""

from __future__ import annotations

from mole_diffusion.layers.bank import ExpertBank, Padding
from mole_diffusion.layers.composed import ComposedConv2d, ComposedLinear, SharedDown, Weigher, compose_layer

__all__ = ["ComposedConv2d", "ComposedLinear", "ExpertBank", "Padding", "SharedDown", "Weigher", "compose_layer"]
