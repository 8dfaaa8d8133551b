"""Pictures that an expert makes of its own subject, and the attention that helps to cut them out."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from mole_diffusion import Expert
from tests.training.helpers import load, lora, same, tensors_of
from training.data import self_views
from training.data.attention import AttentionRecorder, token_positions
from training.data.pictures import has_mask, read_pictures


def test_recorder_changes_nothing_and_goes_without_a_trace(base_folders: dict[str, Path]) -> None:
    base, pipe = load(base_folders["sd-v"])
    prompt = "a zwx robot on a white background"
    conditioning = base.encode(pipe, [prompt], negatives=[""])
    x = torch.randn(2, *base.latent_shape())
    positions = token_positions(pipe.tokenizer, prompt, "zwx robot")
    before = pipe.unet.attn_processors
    with torch.no_grad():
        plain = pipe.unet(x, 500, **conditioning.unet_kwargs).sample
        with AttentionRecorder(pipe.unet, positions) as recorder:
            recorded = pipe.unet(x, 500, **conditioning.unet_kwargs).sample
    assert torch.equal(plain, recorded)
    assert all(pipe.unet.attn_processors[name] is processor for name, processor in before.items())
    heat = recorder.heat(64)
    assert heat is not None and heat.shape == (64, 64) and 0 < heat.min() <= heat.max() <= 1 + 1e-6


def test_attention_of_all_tokens_is_even(base_folders: dict[str, Path]) -> None:
    base, pipe = load(base_folders["sd-v"])
    tokens = list(range(pipe.tokenizer.model_max_length))
    with torch.no_grad(), AttentionRecorder(pipe.unet, tokens) as recorder:
        pipe.unet(torch.randn(1, *base.latent_shape()), 500, **base.encode(pipe, ["a robot"]).unet_kwargs)
    heat = recorder.heat(16)
    assert heat is not None and np.allclose(heat, 1, atol=1e-5)  # softmax sums to one, whatever the place


def test_token_positions(base_folders: dict[str, Path]) -> None:
    _, pipe = load(base_folders["sd-v"])
    words = pipe.tokenizer("a zwx robot on a beach").input_ids
    places = token_positions(pipe.tokenizer, "a zwx robot on a beach", "zwx robot")
    assert pipe.tokenizer.decode([words[place] for place in places]).strip() == "zwx robot"
    assert token_positions(pipe.tokenizer, "a beach", "zwx robot") == []


def test_expert_makes_its_own_cutouts_and_leaves_the_base(base_folders: dict[str, Path], tmp_path: Path) -> None:
    base, pipe = load(base_folders["sd-v"])
    before = tensors_of(pipe)
    expert = Expert.load(lora(tmp_path, pipe, "robot", seed=1))
    lines: list[str] = []
    folder = tmp_path / "views"
    made = self_views.make_self_views(pipe, base, expert, "zwx robot", folder, count=3, log=lines.append)
    assert len(made.cutouts) >= 2 and made.phrase == "zwx robot"
    assert all(has_mask(view) for view in read_pictures(folder))
    assert "of the 3 pictures" in lines[0]
    assert same(before, tensors_of(pipe))
