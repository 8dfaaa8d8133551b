"""Pictures that are nearly the same, found by a difference hash: they teach one view twice."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PIL import Image

NEAR = 5
"""Hashes that differ in at most this many of their 64 bits belong to near-duplicates."""


def difference_hash(picture: Image.Image) -> int:
    """64 bits: in a grid of 8 rows and 9 columns, is each cell brighter than the one to its right?

    Transparent parts count as mid-grey.
    """
    ground = Image.new("RGBA", picture.size, (128, 128, 128, 255))
    flat = Image.alpha_composite(ground, picture.convert("RGBA")).convert("L")
    cells = np.asarray(flat.resize((9, 8), Image.Resampling.LANCZOS), np.int16)
    return int("".join("1" if bit else "0" for bit in (cells[:, :-1] > cells[:, 1:]).flatten()), 2)


def near_duplicates(pictures: Sequence[Image.Image], near: int = NEAR) -> list[tuple[int, ...]]:
    """Groups of pictures by number, each within ``near`` bits (Hamming distance) of the first of its group."""
    hashes = [difference_hash(picture) for picture in pictures]
    left, groups = list(range(len(pictures))), []
    while left:
        group = tuple(n for n in left if (hashes[n] ^ hashes[left[0]]).bit_count() <= near)
        left = [n for n in left if n not in group]
        groups += [group] if len(group) > 1 else []
    return groups
