from __future__ import annotations

from pathlib import Path

import open_clip
import pytest
from transformers import CLIPTokenizer

from mole_diffusion.bases import clip_tokenizer

TEXTS = ["a robot left of a zwx bunny, 3 apples on the Beach", "héllo wörld's 'quoted' café", "日本 & $5.00", ""]


@pytest.mark.parametrize("length", [32, 77])
def test_ids_equal_those_of_open_clip(length: int) -> None:
    ids = clip_tokenizer(length)(TEXTS, padding="max_length", truncation=True, return_tensors="pt").input_ids
    assert ids.tolist() == open_clip.tokenize(TEXTS, context_length=length).tolist()


def test_a_long_prompt_is_cut_and_keeps_its_end_token() -> None:
    ids = clip_tokenizer(8)("one two three four five six seven eight nine", truncation=True).input_ids
    assert len(ids) == 8 and ids[0] == 49406 and ids[-1] == 49407


def test_padding_token_is_that_of_the_model_family() -> None:
    assert clip_tokenizer().pad_token_id == 0
    assert clip_tokenizer(pad_token="<|endoftext|>").pad_token_id == 49407


def test_survives_saving(tmp_path: Path) -> None:
    original = clip_tokenizer(32)
    original.save_pretrained(tmp_path)
    again = CLIPTokenizer.from_pretrained(tmp_path)
    assert again.model_max_length == 32 and again.pad_token_id == 0
    assert [again(text).input_ids for text in TEXTS] == [original(text).input_ids for text in TEXTS]
