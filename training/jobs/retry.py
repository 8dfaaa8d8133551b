"""Calling again while the job database is away for a moment: locked, restarting, out of disk."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

from sqlalchemy import exc

from .errors import StoreUnavailable

Result = TypeVar("Result")
FIRST_WAIT, LONGEST_WAIT = 0.05, 2.0  # seconds


def is_transient(error: Exception) -> bool:
    """Whether the same call may succeed later; wrong SQL or a broken rule never does."""
    if isinstance(error, exc.DBAPIError):
        return isinstance(error, exc.OperationalError | exc.InterfaceError) or bool(error.connection_invalidated)
    return isinstance(error, exc.TimeoutError | StoreUnavailable)


def persist(
    action: Callable[[], Result],
    seconds: float,
    *,
    wait: Callable[[float], object] = time.sleep,
    clock: Callable[[], float] = time.monotonic,
) -> Result:
    """What ``action`` returns, called again after 0.05, 0.1, 0.2 … 2 s while the store is away.

    It must be one transaction. Raises StoreUnavailable when ``seconds`` have passed, other errors at once.
    """
    end, pause = clock() + seconds, FIRST_WAIT
    while True:
        try:
            return action()
        except Exception as error:
            if not is_transient(error):
                raise
            if clock() >= end:
                words = str(getattr(error, "orig", None) or error).strip().partition("\n")[0]
                raise StoreUnavailable(f"The job database was away for {seconds:g} seconds ({words}).") from error
        wait(pause)
        pause = min(2 * pause, LONGEST_WAIT)
