"""Blank words before names, as in "a wqz robot": only a base that met many reads a trigger as nothing.

A base that never met one took "sks" for a banana and lost the background of a prompt with two triggers (LOG.md).
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np

from training.base.scenes import article

STREWN = 0.5
"""Share of captions that may hold blank words; in these, before most names."""
_NAMES = 0.7
_CONSONANTS = "bcdfghjklmnpqrstvwxyz"


class Triggers:
    """Draws blank words: half of them random consonants, half rare words out of the tokenizer's vocabulary.

    Args:
        vocabulary: the tokenizer's entries, most frequent first; ``</w>`` ends a word.
        kept: words that mean something in the demo world, and its own subjects' triggers; never drawn.
    """

    def __init__(self, vocabulary: Sequence[str], kept: frozenset[str]) -> None:
        words = [entry.removesuffix("</w>") for entry in vocabulary[len(vocabulary) // 2 :] if entry.endswith("</w>")]
        self._kept = kept
        self._words = [w for w in words if 3 <= len(w) <= 6 and w.isascii() and w.isalpha() and w not in kept]

    def word(self, rng: np.random.Generator) -> str:
        """One blank word."""
        if rng.random() < 0.5:
            return self._words[int(rng.integers(len(self._words)))]
        while True:
            letters = rng.choice(list(_CONSONANTS), int(rng.integers(3, 5)))
            if (word := "".join(letters)) not in self._kept:
                return word

    def strew(self, caption: str, names: Sequence[str], rng: np.random.Generator) -> str:
        """The caption, in half of all calls with blank words before some of its ``names``."""
        if rng.random() >= STREWN:
            return caption
        for name in names:
            if rng.random() < _NAMES:
                named = article(f"{self.word(rng)} {name}")
                caption = re.sub(rf"\b{re.escape(article(name))}\b", named, caption, count=1)
        return caption
