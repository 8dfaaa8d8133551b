"""Errors of training, in the tree of :mod:`mole_diffusion.errors`."""

from __future__ import annotations

from mole_diffusion.errors import MoleError


class TrainingFailed(MoleError):
    """A run cannot go on, for instance because its loss is not a number; the last checkpoint stays valid."""
