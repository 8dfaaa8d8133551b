"""Experts melted into one: the same numbers as PEFT's own ``add_weighted_adapter``."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from mole_diffusion import Expert, compose
from mole_diffusion.composition import weighted_sum
from mole_diffusion.errors import BaseMismatch, InvalidRequest
from mole_diffusion.experts import LowRank, save_expert
from mole_diffusion.experts.combine import COMBINE_METHODS, combine
from tests.core.small import generate, make_expert, make_sd, run_unet

TARGETS = ("to_q", "to_k", "conv1", "conv_shortcut")
WEIGHTS = [0.8, -0.3]


@pytest.fixture(scope="module")
def peft_unet() -> Any:
    """A tiny UNet that holds two PEFT adapters of rank 4 with the scales 0.5 and 2."""
    from peft import LoraConfig, PeftModel, get_peft_model

    unet = make_sd().unet
    settings = {"r": 4, "target_modules": [*TARGETS], "init_lora_weights": False}
    torch.manual_seed(5)
    model = get_peft_model(unet, LoraConfig(lora_alpha=2, **settings), adapter_name="one")
    assert isinstance(model, PeftModel)
    model.add_adapter("two", LoraConfig(lora_alpha=8, **settings))
    return model


def layers(model: Any) -> dict[str, Any]:
    found = model.base_model.model.named_modules()
    return {f"unet.{path}": module for path, module in found if hasattr(module, "lora_A")}


def as_expert(model: Any, adapter: str) -> Expert:
    pairs = {}
    for key, layer in layers(model).items():
        a, b = layer.lora_A[adapter].weight.data, layer.lora_B[adapter].weight.data
        pairs[key] = LowRank(a, b.flatten(1), layer.scaling[adapter])
    return Expert(adapter, pairs)


@pytest.mark.parametrize("method", COMBINE_METHODS)
def test_equals_peft(peft_unet: Any, method: Any) -> None:
    experts = [as_expert(peft_unet, name) for name in ("one", "two")]
    state = torch.random.get_rng_state()
    ours = combine(experts, WEIGHTS, method, density=0.6, seed=7)
    assert torch.equal(state, torch.random.get_rng_state())
    torch.manual_seed(7)
    lora, made = peft_unet.base_model, f"made_{method}"
    lora.inject_adapter = _without_random_start(lora.inject_adapter)
    lora.add_weighted_adapter(["one", "two"], WEIGHTS, made, combination_type=method, density=0.6)
    theirs = {key: layer.get_delta_weight(made) for key, layer in layers(peft_unet).items()}
    assert list(ours.modules) == list(theirs)
    for key, delta in theirs.items():
        torch.testing.assert_close(ours.modules[key].delta(), delta, rtol=1e-5, atol=1e-5)
    peft_unet.delete_adapter(made)


def _without_random_start(inject: Any) -> Any:
    """The new adapter's random start values come from the generator that pruning uses: put it back afterwards."""

    def injected(*args: Any, **kwargs: Any) -> None:
        state = torch.random.get_rng_state()
        inject(*args, **kwargs)
        torch.random.set_rng_state(state)

    return injected


@pytest.fixture
def mixed(sd: Any) -> list[Expert]:
    """Ranks 2 and 5; only one has to_v."""
    one = make_expert(sd, "robot", seed=1, targets=("to_q", "conv1"), size=0.1)
    return [one, make_expert(sd, "bunny", seed=2, rank=5, targets=("to_q", "to_v"), size=0.1, scale=0.4)]


@pytest.mark.parametrize("method", ["cat", "svd"])
def test_exact_methods_equal_the_weighted_sum(sd: Any, mixed: list[Expert], method: Any) -> None:
    one = combine(mixed, [0.5, 2.0], method, rank=7 if method == "svd" else None)
    assert max(one.ranks) == 7 and one.name == "robot+bunny"
    with compose(sd, mixed, gate=weighted_sum([0.5, 2.0])), torch.no_grad():
        expected = run_unet(sd)
    with compose(sd, [one], gate=weighted_sum(1)), torch.no_grad():
        torch.testing.assert_close(run_unet(sd), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("method", ["ties", "dare_linear", "magnitude_prune_svd"])
def test_ranks_and_modules_may_differ_and_files_keep_it(
    sd: Any, mixed: list[Expert], method: Any, tmp_path: Path
) -> None:
    one = combine(mixed, method=method, seed=3)
    assert set(one.modules) == set(mixed[0].modules) | set(mixed[1].modules)
    again = Expert.load(save_expert(one, tmp_path / "one.safetensors"))
    with compose(sd, [one], gate=weighted_sum(1)):
        picture = generate(sd)
    with compose(sd, [again], gate=weighted_sum(1)) as composition:
        torch.testing.assert_close(generate(sd), picture, rtol=1e-5, atol=1e-5)
        composition.mask(*composition.names)
        masked = generate(sd)
    assert torch.equal(masked, generate(sd)) and not torch.equal(masked, picture)


def test_pruning_sees_each_factor_at_its_own_size(sd: Any) -> None:
    """A low rank beside a high one keeps the same share of its own values."""
    small = make_expert(sd, "small", rank=1, seed=1, targets=("to_q",))
    large = make_expert(sd, "large", rank=8, seed=2, targets=("to_q",))
    key = next(iter(small.modules))
    made = combine([small, large], [1.0, 0.0], "magnitude_prune", density=0.5).modules[key]
    kept = (made.a[0] != 0).sum(), (made.a[1:] != 0).sum()
    assert made.rank == 8 and kept == (small.modules[key].a.numel() // 2, 0)


def test_seeds_decide_random_pruning(mixed: list[Expert]) -> None:
    one, same, other = (combine(mixed, method="dare_linear", seed=seed).sha256 for seed in (1, 1, 2))
    assert one == same != other


def test_what_the_result_knows(mixed: list[Expert]) -> None:
    experts = [replace(expert, role="style", base="demo") for expert in mixed]
    assert (combine(experts).role, combine(experts).base) == ("style", "demo")
    experts[0] = replace(experts[0], role="subject", base="sdxl")
    one = combine(experts, name="both")
    assert (one.name, one.role, one.base, one.trigger) == ("both", "subject", None, None)


def test_tokens_are_kept_unless_they_disagree(mixed: list[Expert]) -> None:
    vectors = {"text_encoder": torch.ones(1, 24)}
    experts = [replace(mixed[0], embeddings={"<a>": vectors}), replace(mixed[1], embeddings={"<b>": vectors})]
    assert set(combine(experts).embeddings) == {"<a>", "<b>"}
    experts[1] = replace(mixed[1], embeddings={"<a>": {"text_encoder": torch.zeros(1, 24)}})
    with pytest.raises(InvalidRequest, match="'<a>' of 'bunny'"):
        combine(experts)


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ({"weights": [1.0]}, "each of 2 experts"),
        ({"weights": [1.0, float("nan")]}, "finite"),
        ({"method": "magic"}, "Expected a method of cat"),
        ({"method": "ties", "density": 0.0}, "density"),
        ({"method": "ties", "density": 1.5}, "density"),
        ({"method": "cat", "rank": 4}, "svd methods"),
        ({"method": "svd", "rank": 0}, "between 1 and"),
        ({"method": "ties", "sign": "loudest"}, "majority"),
    ],
)
def test_bad_arguments(mixed: list[Expert], arguments: dict[str, Any], reason: str) -> None:
    with pytest.raises(InvalidRequest, match=reason):
        combine(mixed, **arguments)


def test_what_cannot_be_combined(sd: Any, mixed: list[Expert]) -> None:
    with pytest.raises(InvalidRequest, match="got none"):
        combine([])
    key, pair = next(iter(mixed[0].modules.items()))
    dora = replace(mixed[0], name="dora", modules={key: replace(pair, magnitude=torch.ones(pair.b.shape[0]))})
    with pytest.raises(InvalidRequest, match="'dora' is DoRA"):
        combine([dora, mixed[1]])
    other = replace(mixed[1], name="other", modules={key: LowRank(torch.ones(1, 3), torch.ones(4, 1))})
    with pytest.raises(BaseMismatch, match="'other': they were made for different bases"):
        combine([mixed[0], other])
    wide = {"unet.x": LowRank(torch.zeros(600, 2), torch.zeros(2, 600))}
    with pytest.raises(InvalidRequest, match="rank 1200"):
        combine([Expert("a", wide), Expert("b", wide)])
