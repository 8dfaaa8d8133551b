"""What holds for every gate on every language model, exactly."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from mole_diffusion import Expert, GateConfig, RouterConfig, StaticWeights, compose, load_composition
from mole_diffusion.composition import learned_static, nla
from mole_diffusion.errors import BaseMismatch, InvalidFile, InvalidRequest
from mole_diffusion.experts import LowRank
from mole_diffusion.text import from_peft
from tests.text.small import MAKERS, batch, logits, peft_model, randomise

GATES: dict[str, Any] = {
    "sample": GateConfig(timestep=False, gain=True),
    "token": GateConfig(scope="token", scale="null", timestep=False),
    "router": RouterConfig(),
    "sample router": RouterConfig(scope="sample"),
    "layer": GateConfig(granularity="layer", scope="token", timestep=False),
    "matrix": GateConfig(granularity="matrix", timestep=False),
    "network": GateConfig(granularity="network", timestep=False),
    "energy": GateConfig(input="energy", timestep=False),
    "learned static": learned_static(2),
}
TARGET_OF = {"llama": "model.model.layers.0.self_attn.q_proj", "t5": "model.encoder.block.0.layer.0.SelfAttention.q"}


@pytest.mark.parametrize("gate", GATES)
def test_all_masked_is_the_base(model: Any, kind: str, experts: list[Expert], gate: str) -> None:
    base, keys = logits(model, kind), list(model.state_dict())
    composition = compose(model, experts, gate=GATES[gate])
    randomise(composition)
    with composition:
        assert not torch.equal(logits(model, kind), base)
        composition.mask("wide", "few")
        assert torch.equal(logits(model, kind), base)
    assert torch.equal(logits(model, kind), base) and list(model.state_dict()) == keys
    assert "generate" not in model.__dict__ and all(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("index", [0, 1])
def test_one_hot_is_the_adapter_as_peft_applies_it(model: Any, kind: str, experts: list[Expert], index: int) -> None:
    more = {} if index == 0 else {"few": True, "rank": 3}
    wanted = logits(peft_model(kind, index, **more), kind)
    with compose(model, experts, gate=StaticWeights([float(i == index) for i in (0, 1)])):
        torch.testing.assert_close(logits(model, kind), wanted, atol=1e-5, rtol=1e-5)


def test_merged_is_unmerged(model: Any, kind: str, experts: list[Expert]) -> None:
    base = logits(model, kind)
    with compose(model, experts, gate=nla(2)) as composition:
        apart = logits(model, kind)
        composition.merge()
        torch.testing.assert_close(logits(model, kind), apart, atol=1e-5, rtol=1e-5)
    assert torch.equal(logits(model, kind), base)
    collapsed = composition.collapse()
    with compose(model, [collapsed], gate=StaticWeights([1.0])):
        torch.testing.assert_close(logits(model, kind), apart, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("gate", ["sample", "token", "router", "learned static"])
def test_saved_and_loaded_is_identical(
    model: Any, kind: str, experts: list[Expert], folder: Path, tmp_path: Path, gate: str
) -> None:
    composition = compose(model, experts, gate=GATES[gate])
    randomise(composition)
    path = composition.save(tmp_path / "both.safetensors")
    with composition:
        before = logits(model, kind)
    for source in (folder, {expert.sha256: expert for expert in experts}):
        with load_composition(path, model, source) as again:
            assert again.names == ("wide", "few") and again.config == composition.config
            assert torch.equal(logits(model, kind), before)


@pytest.mark.parametrize("gate", GATES)
def test_padding_and_neighbours_change_nothing(model: Any, kind: str, experts: list[Expert], gate: str) -> None:
    composition = compose(model, experts, gate=GATES[gate])
    randomise(composition)
    whole = batch(kind, answers=True)
    alone = {key: value[2:] if key == "labels" and kind == "t5" else value[2:, 2:] for key, value in whole.items()}
    with composition, torch.no_grad():
        together, single = model(**whole).logits[2], model(**alone).logits[0]
    torch.testing.assert_close(together[-3:], single[-3:], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("gate", ["sample", "token", "router", "learned static"])
def test_rows_with_their_own_subsets(model: Any, kind: str, experts: list[Expert], gate: str) -> None:
    base = logits(model, kind)
    composition = compose(model, experts, gate=GATES[gate])
    randomise(composition)
    with composition:
        everything = logits(model, kind)
        composition.use_subsets([["wide"], [], ["wide", "few"]])
        rows = logits(model, kind)
        composition.use_subsets(None)
        composition.mask("few")
        wide = logits(model, kind)
    for row, wanted in enumerate((wide, base, everything)):
        torch.testing.assert_close(rows[row], wanted[row], atol=1e-4, rtol=1e-4)


def test_experts_come_from_memory_as_from_a_folder(kind: str, folder: Path) -> None:
    stored, held = Expert.load(folder / "few"), from_peft(peft_model(kind, 1, few=True, rank=3), "few")
    assert stored.name == "few" and set(stored.modules) == set(held.modules) and TARGET_OF[kind] in stored.modules
    for key, pair in stored.modules.items():
        assert pair.scale == held.modules[key].scale == 2.0 and pair.rank == 3
        assert torch.equal(pair.a, held.modules[key].a) and torch.equal(pair.b, held.modules[key].b)
    with pytest.raises(InvalidRequest, match="no adapter named 'other'"):
        from_peft(peft_model(kind, 1), "few", adapter_name="other")


def test_refusals(model: Any, kind: str, experts: list[Expert], tmp_path: Path) -> None:
    other = MAKERS["llama" if kind == "t5" else "t5"]()
    with pytest.raises(BaseMismatch, match="modules do not exist there"):
        compose(other, experts)
    with pytest.raises(InvalidRequest, match="still has adapters loaded"):
        compose(peft_model(kind, 0).base_model.model, experts)
    with pytest.raises(InvalidRequest, match="tokenizer"):
        compose(model, experts).host.spans(["hello"], experts)
    peft_model(kind, 0, few=True, modules_to_save=["lm_head"]).save_pretrained(str(tmp_path))
    with pytest.raises(InvalidFile, match="fully trained modules"):
        Expert.load(tmp_path)


def test_layers_with_experts_of_their_own_are_refused() -> None:
    from transformers import Qwen2MoeConfig, Qwen2MoeForCausalLM

    sizes = {"hidden_size": 16, "intermediate_size": 16, "moe_intermediate_size": 8}
    more = {"num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2, "vocab_size": 24}
    routed = Qwen2MoeForCausalLM(
        Qwen2MoeConfig(**sizes, **more, num_experts=2, num_experts_per_tok=1, shared_expert_intermediate_size=8)
    ).eval()
    for leaf, fits in (("self_attn.q_proj", True), ("mlp.shared_expert.up_proj", False)):
        weight = routed.get_submodule(f"model.layers.0.{leaf}").weight
        pair = LowRank(torch.ones(1, weight.shape[1]), torch.ones(weight.shape[0], 1))
        composition = compose(routed, [Expert("a", {f"model.model.layers.0.{leaf}": pair})])
        with nullcontext() if fits else pytest.raises(InvalidRequest, match="mixture-of-experts"), composition:
            generated = routed.generate(torch.tensor([[3, 4], [5, 6]]), max_new_tokens=2, do_sample=False)
            assert generated.shape[0] == 2
    assert isinstance(routed.model.layers[0].mlp.shared_expert.up_proj, torch.nn.Linear)


def test_a_bundle_of_model_and_tokenizer(model: Any, kind: str, experts: list[Expert]) -> None:
    with compose(model, experts, gate=nla(2)):
        wanted = logits(model, kind)
    with compose(SimpleNamespace(model=model, tokenizer=None), experts, gate=nla(2)):
        assert torch.equal(logits(model, kind), wanted)
