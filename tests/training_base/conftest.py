"""Drawn things in place of the emoji corpus: no network, same code."""

from __future__ import annotations

import numpy as np
import pytest

from training.base.corpus import THING_NAMES, Cutout


def drawn_things(count: int = 12) -> dict[str, Cutout]:
    """Discs and bars in different colours, RGBA, under real names."""
    rng = np.random.default_rng(0)
    rows, columns = np.mgrid[0:48, 0:48]
    things = {}
    for index, name in enumerate(THING_NAMES[:count]):
        inside = (rows - 24) ** 2 + (columns - 24) ** 2 < 400 if index % 2 else np.abs(rows - columns) < 14
        rgba = np.zeros((48, 48, 4), np.uint8)
        rgba[..., :3] = rng.integers(0, 255, 3)
        rgba[..., 3] = inside * 255
        things[name] = Cutout(name, rgba)
    return things


@pytest.fixture(scope="session")
def things() -> dict[str, np.ndarray]:
    """Name -> RGBA array."""
    return {name: thing.rgba for name, thing in drawn_things().items()}
