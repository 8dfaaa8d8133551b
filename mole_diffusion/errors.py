"""The errors that this library raises on purpose.

MoleError                what was expected, what came, what to do; one sentence for a user
├── InvalidFile          a file is refused: not safetensors, damaged, not a LoRA, too large
├── BaseMismatch         an expert or composition does not fit the base model
├── InvalidRequest       an argument or a setting cannot be honoured
└── Cancelled            the user stopped the work
"""

from __future__ import annotations


class MoleError(Exception):
    """Root of the tree. ``str(error)`` is a sentence that can be shown to a user as it is."""


class InvalidFile(MoleError):
    """A file is refused by its content; nothing of it was kept."""


class BaseMismatch(MoleError):
    """An expert or a composition was made for another base model."""


class InvalidRequest(MoleError):
    """A setting is unknown, contradictory or out of range."""


class Cancelled(MoleError):
    """The work was stopped on request; what had been made stays valid."""
