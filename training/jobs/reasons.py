"""Why a job failed, as a sentence that says what to do."""

from __future__ import annotations

import errno
from collections.abc import Mapping
from typing import Any

from mole_diffusion.errors import MoleError

_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_FULL_WORDS = ("No space left on device", "Disk quota exceeded", "File too large", "disk is full")
_MEMORY_WORDS = ("out of memory", "can't allocate memory", "Cannot allocate memory")


def sentence(error: Exception, config: Mapping[str, Any]) -> str:
    """``error`` for the user; running out of memory or disk names what to change."""
    causes = [cause for cause in (error, error.__cause__) if isinstance(cause, Exception)]
    if any(map(is_memory, causes)):
        return f"The device has too little memory for this job ({settings(config)}). {_lower()}"
    if any(map(is_disk, causes)):
        return (
            "The disk is full and nothing more could be written. Free space, then retry: the job goes on from its "
            "last checkpoint, which is whole."
        )
    if isinstance(error, MoleError):
        return str(error)
    return f"Training stopped with {type(error).__name__}: {error}"


def died(config: Mapping[str, Any], last_words: str) -> str:
    """For a process that ended without a word, twice without a checkpoint in between."""
    return (
        f"The training process died, most often because the machine ran out of memory ({settings(config)}). {_lower()} "
        f"Its last words: {last_words}"
    )


def is_lost_peer(error: Exception) -> bool:
    """Whether another process of a job on several devices is gone: the worker then decides, and may start it again."""
    words = ("Connection reset by peer", "Connection closed by peer")
    return isinstance(error, RuntimeError) and any(word in str(error) for word in words)


def is_memory(error: Exception) -> bool:
    """Whether memory ran out, the machine's or the GPU's (torch.OutOfMemoryError is a RuntimeError that says so)."""
    if isinstance(error, MemoryError):
        return True
    return isinstance(error, RuntimeError | OSError) and any(words in str(error) for words in _MEMORY_WORDS)


def is_disk(error: Exception) -> bool:
    """Whether the disk ran out; safetensors and the database say so only in words."""
    return getattr(error, "errno", None) in _FULL or any(words in str(error) for words in _FULL_WORDS)


def settings(config: Mapping[str, Any]) -> str:
    """The settings that memory depends on, as they were given."""
    named = [f"{name} {config[name]}" for name in ("base", "preset", "batch", "resolution") if config.get(name)]
    return ", ".join(named) or "settings as usual"


def _lower() -> str:
    return "Lower the batch or the resolution, or choose a preset for less memory."
