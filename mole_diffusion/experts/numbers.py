"""Numbers in strangers' metadata."""

from __future__ import annotations

import math
from typing import Any


def as_finite(value: Any) -> float | None:
    """A JSON number as a finite float; None for everything else, also for whole numbers of 400 digits."""
    if not isinstance(value, int | float) or isinstance(value, bool):
        return None
    try:
        return float(value) if math.isfinite(value) else None
    except OverflowError:
        return None
