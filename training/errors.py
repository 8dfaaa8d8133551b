"""Errors of training, in the tree of :mod:`mole_diffusion.errors`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from mole_diffusion.errors import MoleError

_WORDS = ("out of memory", "can't allocate memory", "not enough memory")


class TrainingFailed(MoleError):
    """A run cannot go on, for instance because its loss is not a number; the last checkpoint stays valid."""


@contextmanager
def memory_named(sentence: str) -> Iterator[None]:
    """Turn whatever says that memory is used up, on any device, into TrainingFailed with ``sentence``."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        # Only newer backends have a class for it; the others raise RuntimeError with these words.
        if not isinstance(error, MemoryError) and not any(words in str(error).lower() for words in _WORDS):
            raise
        raise TrainingFailed(sentence) from error
