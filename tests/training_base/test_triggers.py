from __future__ import annotations

import numpy as np
import pytest

from training.base.diffusion import blank_words
from training.base.subjects import SUBJECTS
from training.base.triggers import STREWN, Triggers


@pytest.fixture(scope="module")
def triggers() -> Triggers:
    return blank_words(32)


def test_blank_words_mean_nothing_in_the_demo_world(triggers: Triggers) -> None:
    rng = np.random.default_rng(0)
    words = [triggers.word(rng) for _ in range(3000)]
    meant = {"cat", "robot", "apple", "green", "beach", "night", "left", "background"}
    assert not meant & set(words) and not {subject.token for subject in SUBJECTS} & set(words)
    assert len(set(words)) > 2000 and all(word.isalpha() and 3 <= len(word) <= 6 for word in words)


def test_captions_stay_what_they_are_but_for_words_before_their_names(triggers: Triggers) -> None:
    rng, names = np.random.default_rng(1), ["owl", "red apple"]
    caption = "an owl left of a red apple in the snow"
    drawn = [triggers.strew(caption, names, rng) for _ in range(400)]
    changed = [text for text in drawn if text != caption]
    assert 0.3 < len(changed) / len(drawn) < STREWN
    for text in changed:
        first, second = text.removesuffix(" in the snow").split(" left of ")
        assert first.split()[-1] == "owl" and second.split()[-2:] == ["red", "apple"]
        assert first.split()[0] in ("a", "an") and len(first.split()) <= 3 and len(second.split()) <= 4


def test_a_name_inside_another_word_is_left_alone() -> None:
    triggers = Triggers(["x", "zzzz</w>"], frozenset())
    drawn = {triggers.strew("a balloon and a ball at night", ["ball"], np.random.default_rng(s)) for s in range(40)}
    assert all(text.startswith("a balloon and a") and text.endswith("ball at night") for text in drawn)
    assert len(drawn) > 2
