"""Tokens that experts bring are taught to the pipeline on attach, and forgotten without a trace."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from mole_diffusion import compose
from mole_diffusion.composition import nla
from mole_diffusion.errors import BaseMismatch, InvalidRequest
from tests.core.small import generate, make_expert


def with_tokens(pipe: Any, name: str, token: str, count: int = 2) -> Any:
    random = torch.Generator().manual_seed(len(name))
    encoders = [part for part in ("text_encoder", "text_encoder_2") if getattr(pipe, part, None) is not None]
    vectors = {
        part: torch.randn(count, getattr(pipe, part).get_input_embeddings().embedding_dim, generator=random)
        for part in encoders
    }
    return replace(make_expert(pipe, name, size=0.1, trigger=token), embeddings={token: vectors})


def test_a_prompt_with_the_token_shows_its_vectors_and_detach_forgets_them(pipe: Any) -> None:
    """As textual inversion in stock diffusers, to the last bit."""
    expert = with_tokens(pipe, "robot", "<s0>")
    tokenizer, table = pipe.tokenizer, pipe.text_encoder.get_input_embeddings()
    prompt = "a <s0> on a hill"
    before = generate(pipe, prompt)
    composition = compose(pipe, [expert], gate=nla(1))
    with composition:
        ids = pipe.tokenizer("<s0> <s0>_1", add_special_tokens=False).input_ids
        assert len(ids) == 2 and min(ids) >= len(tokenizer)
        composition.mask("robot")
        ours = generate(pipe, prompt)
        spans = composition.host.spans([prompt], [expert])
        assert int(spans.sum()) == 1  # the first of its two vectors is the trigger that the prompt names
    assert not torch.equal(ours, before)
    assert pipe.tokenizer is tokenizer and pipe.text_encoder.get_input_embeddings() is table
    assert torch.equal(generate(pipe, prompt), before)
    for part, words in (("text_encoder", "tokenizer"), ("text_encoder_2", "tokenizer_2")):
        if getattr(pipe, part, None) is not None:
            vectors = expert.embeddings["<s0>"][part]
            pipe.load_textual_inversion(
                vectors, token="<s0>", text_encoder=getattr(pipe, part), tokenizer=getattr(pipe, words)
            )
    torch.testing.assert_close(ours, generate(pipe, prompt), rtol=1e-6, atol=1e-6)


def test_what_cannot_be_taught_leaves_the_pipeline_as_it_was(sd: Any) -> None:
    robot, bunny = with_tokens(sd, "robot", "<s0>"), with_tokens(sd, "bunny", "<s0>")
    tokenizer, before = sd.tokenizer, generate(sd)
    with pytest.raises(InvalidRequest, match="'robot' and 'bunny' both define the token '<s0>'"):
        compose(sd, [robot, bunny], gate=nla(2)).attach()
    with pytest.raises(InvalidRequest, match="has already"):
        compose(sd, [with_tokens(sd, "robot", "a</w>")], gate=nla(1)).attach()
    narrow = replace(robot, embeddings={"<s0>": {"text_encoder": torch.ones(1, 3)}})
    with pytest.raises(BaseMismatch, match=r"text_encoder \(3\)"):
        compose(sd, [narrow], gate=nla(1)).attach()
    foreign = replace(robot, embeddings={"<s0>": {"text_encoder_2": torch.ones(1, 24)}})
    with pytest.raises(BaseMismatch, match=r"text_encoder_2 \(24\)"):
        compose(sd, [foreign], gate=nla(1)).attach()
    assert sd.tokenizer is tokenizer and torch.equal(generate(sd), before)


def test_tokens_follow_a_switch(sd: Any) -> None:
    robot, bunny = with_tokens(sd, "robot", "<s0>"), with_tokens(sd, "bunny", "<s1>")
    with compose(sd, [robot], gate=nla(1), bucket=True) as composition:
        composition.switch([bunny])
        assert "<s1>" in sd.tokenizer.get_vocab() and "<s0>" not in sd.tokenizer.get_vocab()


def test_a_switch_that_fails_leaves_the_experts_that_were_there(sd: Any) -> None:
    tokens = {"robot": "<s0>", "bunny": "<s1>", "cat": "<s1>"}
    robot, bunny, cat = (with_tokens(sd, name, token) for name, token in tokens.items())
    with compose(sd, [robot, bunny], gate=nla(2)) as composition:
        before = generate(sd, "a <s0> and a <s1>")
        with pytest.raises(InvalidRequest, match="both define"):
            composition.switch([bunny, cat])
        assert composition.names == ("robot", "bunny") and composition.attached
        assert torch.equal(generate(sd, "a <s0> and a <s1>"), before)
        composition.merge()
        before = generate(sd, "a <s0> and a <s1>")
        weights = sd.unet.mid_block.attentions[0].transformer_blocks[0].attn1.to_q.weight.clone()
        with pytest.raises(InvalidRequest, match="both define"):
            composition.switch([bunny, cat])
        assert torch.equal(sd.unet.mid_block.attentions[0].transformer_blocks[0].attn1.to_q.weight, weights)
        assert torch.equal(generate(sd, "a <s0> and a <s1>"), before)
