"""Generation in one pass: the same tokens with a cache, without, with beams, and as training sees them."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from mole_diffusion import Expert, GateConfig, compose
from mole_diffusion.composition import Composition
from mole_diffusion.errors import InvalidRequest
from tests.text.small import END, PAD, batch, randomise
from tests.text.test_contract import GATES

NEW = 6


def composed(model: Any, experts: list[Expert], gate: str) -> Composition:
    composition = compose(model, experts, gate=GATES[gate])
    randomise(composition)
    return composition


def generate(model: Any, kind: str, **more: Any) -> Any:
    settings = {"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False, **more}
    return model.generate(**batch(kind), **settings)


@pytest.mark.parametrize("gate", GATES)
def test_cached_is_uncached_is_training(model: Any, kind: str, experts: list[Expert], gate: str) -> None:
    with composed(model, experts, gate):
        cached = generate(model, kind, output_logits=True, return_dict_in_generate=True)
        assert torch.equal(generate(model, kind, use_cache=False), cached.sequences)
        answers, given = cached.sequences[:, -NEW:].contiguous(), batch(kind)
        labels = answers
        if kind == "llama":
            labels = torch.cat([torch.full_like(given["input_ids"], -100), answers], 1)
            mask = torch.cat([given["attention_mask"], torch.ones_like(answers)], 1)
            given = {"input_ids": cached.sequences, "attention_mask": mask}
        with torch.no_grad():
            seen = model(**given, labels=labels).logits
    seen = seen[:, -NEW - 1 : -1] if kind == "llama" else seen
    wanted = torch.stack(cached.logits, 1)
    if not (gate == "matrix" and kind == "llama"):  # the head's own gate: generation shows it the last token alone
        allowed = {"atol": 1e-3, "rtol": 1e-4}
        torch.testing.assert_close(seen[..., END + 1 :], wanted[..., END + 1 :], **allowed)


@pytest.mark.parametrize("gate", ["sample", "token", "router", "network"])
def test_beams_keep_the_weights_of_their_prompt(model: Any, kind: str, experts: list[Expert], gate: str) -> None:
    with composed(model, experts, gate) as composition:
        composition.use_subsets([["wide"], ["few"], ["wide", "few"]])
        cached = generate(model, kind, num_beams=3)
        assert torch.equal(generate(model, kind, num_beams=3, use_cache=False), cached)
        composition.use_subsets([["few"]])
        one = {key: value[1:2] for key, value in batch(kind).items()}
        alone = model.generate(**one, max_new_tokens=NEW, min_new_tokens=NEW, do_sample=False, num_beams=3)
    assert torch.equal(alone[0, -NEW:], cached[1, -NEW:])


def test_traces_tell_prompt_and_steps(model: Any, kind: str, experts: list[Expert]) -> None:
    block = "model.layers.1" if kind == "llama" else "decoder.block.1"
    for gate, spoken in (("sample", 1), ("token", NEW)):
        with composed(model, experts, gate) as composition:
            generate(model, kind)
            generate(model, kind)
            trace = composition.trace()
        assert trace.steps == NEW and len(trace.weights[block]) == spoken


def test_gates_look_at_the_prompt_and_not_at_padding_or_answer(model: Any, experts: list[Expert], kind: str) -> None:
    with composed(model, experts, "sample") as composition, torch.no_grad():
        weights = []
        for seed, answer in ((5, 7), (5, 9), (6, 9)):
            given = batch(kind, answers=True, seed=seed)
            if kind == "llama":
                given["input_ids"][:, -3:] = answer
            given["labels"][:, -3:] = answer
            model(**given)
            weights.append({k: r.probabilities for k, r in composition._context.records.items() if k != "network"})
    assert len(weights[0]) == (2 if kind == "llama" else 4)
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    assert not any(torch.allclose(weights[0][name], weights[2][name]) for name in weights[0])


def test_a_prompt_that_nobody_saw_is_refused(model: Any, kind: str, experts: list[Expert]) -> None:
    given = batch(kind)
    start = {"decoder_input_ids": torch.full((3, 1), PAD)} if kind == "t5" else {}
    with torch.no_grad():
        before = model(**given, **start, use_cache=True)
    more: dict[str, Any] = {"past_key_values": before.past_key_values}
    if kind == "t5":
        more |= {"encoder_outputs": (before.encoder_last_hidden_state,), "decoder_input_ids": torch.full((3, 1), 5)}
    else:
        more |= {"input_ids": torch.full((3, 1), 5)}
    with composed(model, experts, "sample"), pytest.raises(InvalidRequest, match="prompt that no gate saw"):
        model(**more)
    with composed(model, experts, "sample"), pytest.raises(InvalidRequest, match="prefill_chunk_size"):
        generate(model, kind, prefill_chunk_size=2)


def test_outputs_of_experts_and_caches(model: Any, kind: str, experts: list[Expert]) -> None:
    composition = compose(model, experts, gate=GateConfig(input="expert_outputs", timestep=False))
    randomise(composition)
    with composition:
        with pytest.raises(InvalidRequest, match="use_cache=False"):
            generate(model, kind)
        assert generate(model, kind, use_cache=False).shape[0] == 3


class Words:
    """A tokenizer of one id per word, w5 → 5."""

    def __call__(self, text: Any, add_special_tokens: bool = True, **kwargs: Any) -> Any:
        ids = [[int(word[1:]) for word in prompt.split()] for prompt in ([text] if isinstance(text, str) else text)]
        return SimpleNamespace(input_ids=torch.tensor(ids) if "return_tensors" in kwargs else ids[0])


def test_triggers_are_found_in_what_the_encoder_reads(model: Any, kind: str, experts: list[Expert]) -> None:
    from dataclasses import replace

    named = [replace(expert, trigger=f"w{5 + i}") for i, expert in enumerate(experts)]
    gate = GateConfig(scope="token", timestep=False, text_prior=20.0)
    given = {"input_ids": torch.tensor([[4, 5, 6]]), "labels": torch.tensor([[7, 7, 7]])}
    with compose(SimpleNamespace(model=model, tokenizer=Words()), named, gate=gate) as composition, torch.no_grad():
        model(**given)
        records = dict(composition._context.records)
    texts = {name: record.probabilities for name, record in records.items() if name.endswith(":text")}
    assert sorted(texts) == ([] if kind == "llama" else ["decoder.block.0:text", "decoder.block.1:text"])
    for weights in texts.values():
        torch.testing.assert_close(weights[0].round(), torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0]]))


@pytest.mark.parametrize("more", [{"cache_implementation": "static"}, {"prompt_lookup_num_tokens": 2}])
def test_other_ways_to_generate_say_the_same(model: Any, kind: str, experts: list[Expert], more: Any) -> None:
    one = {key: value[:1] for key, value in batch(kind).items()}
    with composed(model, experts, "sample"):
        wanted = model.generate(**one, max_new_tokens=NEW, min_new_tokens=NEW, do_sample=False)
        found = model.generate(**one, max_new_tokens=NEW, min_new_tokens=NEW, do_sample=False, **more)
    assert torch.equal(found, wanted)
