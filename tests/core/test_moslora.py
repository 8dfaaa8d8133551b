"""MoSLoRA: exact values, training, merging, several adapters, 4-bit bases."""

from __future__ import annotations

import copy
import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from torch import nn

from mole_diffusion.adapters import (
    MIXER_INITS,
    MoSLoraConfig,
    add_moslora,
    fold_down,
    fold_modules,
    init_mixer,
    load_moslora,
    register_moslora,
    save_moslora,
)
from mole_diffusion.errors import InvalidRequest
from tests.core.mosaic import attached, close, config, expected, pictures, shake, toy, train
from tests.core.small import make_sd

# --- the mixer -------------------------------------------------------------------------------------------------------


def test_inits_are_what_they_say() -> None:
    torch.manual_seed(0)
    kaiming, normal, orthogonal = (init_mixer(kind, 64) for kind in ("kaiming", "normal", "orthogonal"))
    assert kaiming.abs().max() <= 1 / 8 and abs(float(kaiming.std()) - 1 / 8 / 3**0.5) < 2e-3
    assert abs(float(normal.std()) - 1 / 8) < 3e-3
    assert close(orthogonal @ orthogonal.T, torch.eye(64))
    assert torch.equal(init_mixer("identity", 3), torch.eye(3))
    butterfly = [[1, 0, 1, 0], [0, 1, 0, 1], [1, 0, 1, 0], [0, 1, 0, 1]]
    assert torch.equal(init_mixer("butterfly", 4), torch.tensor(butterfly, dtype=torch.float32))


@pytest.mark.parametrize(
    ("settings", "part"),
    [
        ({"mixer_init": "zero"}, "kills every gradient"),
        ({"mixer_init": "xavier"}, "kaiming, orthogonal, normal, identity, butterfly"),
        ({"mixer_init": ""}, "got ''"),
        ({"mixer_init": "butterfly", "r": 3}, "even rank, got 3"),
        ({"mixer_init": "butterfly", "rank_pattern": {"linear": 5}}, "even rank, got 5"),
        ({"use_dora": True}, "use_dora"),
        ({"alora_invocation_tokens": [1], "task_type": "CAUSAL_LM"}, "alora_invocation_tokens"),
        ({"lora_bias": True}, "lora_bias"),
        ({"bias": "lora_only"}, "lora_only"),
        ({"modules_to_save": ["linear"]}, "modules_to_save"),
        ({"init_lora_weights": "pissa"}, "pissa"),
        ({"init_lora_weights": "orthogonal"}, "orthogonal"),
    ],
)
def test_settings_without_a_meaning_are_refused(settings: dict[str, Any], part: str) -> None:
    with pytest.raises(InvalidRequest, match=part):
        config(**settings)


def test_fold_down_of_a_convolution() -> None:
    a, w = torch.randn(4, 3, 5, 5), torch.randn(4, 4)
    assert close(fold_down(a, w), torch.einsum("ij,jckl->ickl", w, a))


# --- values ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", MIXER_INITS)
def test_forward_merge_and_fold_agree_with_the_equation(kind: str) -> None:
    plain, x = toy(), pictures()
    model = attached(mixer_init=kind)
    wanted = expected(plain, model, x)
    assert not close(wanted, plain(x), 0.01)
    assert close(model(x), wanted)

    for safe in (False, True):
        model.merge_adapter(safe_merge=safe)
        assert close(model(x), wanted)
        model.unmerge_adapter()
        assert close(model(x), wanted)
    with model.disable_adapter():
        assert close(model(x), plain(x))

    merged = copy.deepcopy(model).merge_and_unload()
    for path, pair in fold_modules(model).items():
        name = path.removeprefix("unet.")
        layer, weight = getattr(merged, name), getattr(plain, name).weight
        assert pair.rank == 4 and pair.scale == 1.5
        assert close(weight + pair.delta(), layer.weight)


def test_starts_as_the_base_and_draws_from_the_random_state() -> None:
    x = pictures()
    states = []
    for seed in (5, 5, 6):
        model = toy()
        torch.manual_seed(seed)
        model = add_moslora(model, config())
        assert torch.equal(model(x), toy()(x))
        states.append(get_peft_model_state_dict(model))
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])
    mixer = "base_model.model.linear.lora_mixer.weight"
    assert not torch.equal(states[0][mixer], states[2][mixer])
    assert float(states[0][mixer].abs().max()) <= 0.5  # 1/√4


def test_identity_starts_as_lora_and_rank_stabilised_scale_holds() -> None:
    model = attached(mixer_init="identity", use_rslora=True)
    with torch.no_grad():
        for layer in ("convolution", "pointwise", "linear"):
            getattr(model.base_model.model, layer).lora_mixer["default"].weight.copy_(torch.eye(4))
    plain = get_peft_model(toy(), LoraConfig(r=4, lora_alpha=6, target_modules=["convolution", "pointwise", "linear"]))
    with torch.no_grad():
        for name, parameter in plain.named_parameters():
            if ".lora_" in name:
                parameter.copy_(model.get_parameter(name))
    for layer in plain.modules():
        if hasattr(layer, "set_scale"):
            layer.set_scale("default", 2.0)  # α/√r is twice α/r at r = 4
    assert close(model(pictures()), plain(pictures()), 1e-6)
    assert {pair.scale for pair in fold_modules(model).values()} == {3.0}


def test_dropout_acts_before_a_and_only_in_training() -> None:
    model = attached(lora_dropout=0.5)
    x = pictures()
    assert close(model(x), expected(toy(), model, x))
    layer = model.base_model.model.linear.train()
    rows = torch.randn(2, 8)
    torch.manual_seed(3)
    got = layer(rows)
    torch.manual_seed(3)
    dropped = nn.functional.dropout(rows, 0.5)
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    assert close(got, layer.base_layer(rows) + 1.5 * dropped @ (b @ layer.lora_mixer["default"].weight @ a).T)


# --- training --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", MIXER_INITS)
def test_gradients_reach_b_first_and_then_mixer_and_a(kind: str) -> None:
    first, second = train(add_moslora(toy(), config(mixer_init=kind)))
    assert {name for name, moved in first.items() if moved} == {name for name in first if "lora_B" in name}
    assert all(second.values())
    assert sum("lora_mixer" in name for name in first) == (0 if kind == "butterfly" else 3)
    assert len(first) == (6 if kind == "butterfly" else 9)


def test_a_fixed_mixer_stays_fixed() -> None:
    model = add_moslora(toy(), config(mixer_init="butterfly"))
    model.set_adapter("default")
    train(model)
    mixer = model.base_model.model.linear.lora_mixer["default"].weight
    assert torch.equal(mixer, init_mixer("butterfly", 4)) and not mixer.requires_grad


# --- several adapters ------------------------------------------------------------------------------------------------


def test_several_adapters_and_mixed_batches() -> None:
    x = pictures(4)
    model = attached("one")
    model = attached("two", model, r=2, mixer_init="butterfly", lora_alpha=2)
    model.add_adapter("plain", LoraConfig(r=3, target_modules=["linear"]))
    shake(model, "plain")
    alone = {}
    for name in ("one", "two", "plain"):
        model.set_adapter(name)
        alone[name] = model(x)
    assert close(alone["one"], expected(toy(), model, x, "one"))
    assert close(alone["two"], expected(toy(), model, x, "two"))

    names = ["two", "__base__", "one", "plain"]
    mixed = model(x, adapter_names=names)
    base = toy()(x)
    for row, name in enumerate(names):
        assert close(mixed[row], base[row] if name == "__base__" else alone[name][row])

    model.base_model.set_adapter(["one", "two"])
    both = model(x)
    model.merge_adapter(["one", "two"])
    assert close(model(x), both)
    model.unmerge_adapter()
    model.set_adapter("one")
    model.delete_adapter("two")
    assert close(model(x), alone["one"])
    assert not any(".two." in key for key in model.state_dict())


def test_folding_a_plain_adapter_leaves_it_and_folding_dora_is_refused() -> None:
    model = attached("one")
    model.add_adapter("plain", LoraConfig(r=3, target_modules=["linear"]))
    model.add_adapter("dora", LoraConfig(r=3, target_modules=["linear"], use_dora=True))
    pair = fold_modules(model, adapter_name="plain")["unet.linear"]
    assert torch.equal(pair.a, model.base_model.model.linear.lora_A["plain"].weight)
    with pytest.raises(InvalidRequest, match="Dora"):
        fold_modules(model, adapter_name="dora")
    with pytest.raises(InvalidRequest, match="'absent'"):
        fold_modules(model, adapter_name="absent")


def test_what_peft_would_do_wrong_is_refused() -> None:
    with pytest.raises(InvalidRequest, match="add_moslora"):
        get_peft_model(toy(), config())
    with pytest.raises(InvalidRequest, match="fold the adapters"):
        attached("one").add_weighted_adapter(["one"], [1.0], "blend", combination_type="svd")
    lora = get_peft_model(toy(), LoraConfig(r=2, target_modules=["linear"]))
    with pytest.raises(InvalidRequest, match="MoSLoRA adapter first"):
        add_moslora(lora, config(), "second")
    with pytest.raises(InvalidRequest, match="already has an adapter named 'one'"):
        attached("one", attached("one"))
    embedding = nn.Sequential(nn.Embedding(4, 4))
    with pytest.raises(InvalidRequest, match="'0' is Embedding"):
        add_moslora(embedding, config(target_modules=["0"]))
    assert not hasattr(embedding, "peft_config")
    grouped = nn.Sequential(nn.Conv2d(4, 4, 3, groups=2))
    with pytest.raises(InvalidRequest, match="2 groups"):
        add_moslora(grouped, config(target_modules=["0"]))


def test_an_adapter_that_fails_leaves_nothing_behind() -> None:
    unet = make_sd().unet
    keys = list(unet.state_dict())
    with pytest.raises(InvalidRequest, match=r"norm1' is GroupNorm"):
        add_moslora(unet, MoSLoraConfig(target_modules=["to_q", "norm1"]), "one")
    assert list(unet.state_dict()) == keys
    add_moslora(unet, MoSLoraConfig(target_modules=["to_q"]), "one")
    keys = list(unet.state_dict())
    with pytest.raises(InvalidRequest, match=r"norm1' is GroupNorm"):
        add_moslora(unet, MoSLoraConfig(target_modules=["to_q", "norm1"]), "two")
    assert list(unet.state_dict()) == keys and unet.active_adapters() == ["one"]


def test_registered_configurations_work_with_pefts_own_functions() -> None:
    model = get_peft_model(toy(), register_moslora(config()))
    shake(model)
    assert close(model.eval()(pictures()), expected(toy(), model, pictures()))


# --- precision -------------------------------------------------------------------------------------------------------


def test_half_precision_bases_keep_the_adapter_in_float32() -> None:
    model = add_moslora(toy().bfloat16(), config())
    shake(model)
    assert {value.dtype for name, value in model.named_parameters() if "lora_" in name} == {torch.float32}
    reference = expected(toy(), model, pictures())
    with torch.no_grad():
        assert close(model(pictures().bfloat16()).float(), reference, 0.2)
        model.merge_adapter()
        assert model.base_model.model.linear.weight.dtype == torch.bfloat16
        assert close(model(pictures().bfloat16()).float(), reference, 0.2)


@pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed")
def test_a_four_bit_base_trains_and_its_fold_is_exact(tmp_path: Path) -> None:
    import bitsandbytes as bnb

    def packed() -> nn.Module:
        torch.manual_seed(0)
        layers = [bnb.nn.Linear4bit(64, 64, quant_type="nf4", compute_dtype=torch.float32) for _ in range(2)]
        return nn.Sequential(layers[0], nn.Tanh(), layers[1]).requires_grad_(False).to("cpu")

    def run(model: nn.Module) -> torch.Tensor:
        return model(torch.randn(5, 64, generator=torch.Generator().manual_seed(1)))

    base = run(packed())
    model = add_moslora(packed(), config(target_modules=["0", "2"]))
    assert torch.equal(run(model), base)
    trained = {name: value for name, value in model.named_parameters() if value.requires_grad}
    optimiser = torch.optim.SGD(list(trained.values()), lr=5.0)
    for _ in range(2):
        optimiser.zero_grad()
        (run(model) - 1).square().mean().backward()
        optimiser.step()
    assert len(trained) == 6 and all(value.grad is not None and value.grad.any() for value in trained.values())
    wanted = run(model).detach()
    assert not close(wanted, base, 0.01)

    folded = fold_modules(model)
    plain = get_peft_model(packed(), LoraConfig(r=4, lora_alpha=6, target_modules=["0", "2"]))
    for path, pair in folded.items():
        layer: Any = plain.base_model.model.get_submodule(path.removeprefix("unet."))
        layer.lora_A["default"].weight.data.copy_(pair.a)
        layer.lora_B["default"].weight.data.copy_(pair.b)
    assert close(run(plain), wanted)

    save_moslora(model, tmp_path)
    assert torch.equal(run(load_moslora(packed(), tmp_path)), wanted)
    layer = model.base_model.model[0]
    with pytest.warns(UserWarning, match="rounding"):
        model.merge_adapter()
    merged = bnb.functional.dequantize_4bit(layer.base_layer.weight.data, layer.base_layer.weight.quant_state)
    unpacked: Any = packed()[0]
    exact = bnb.functional.dequantize_4bit(unpacked.weight.data, unpacked.weight.quant_state) + folded["unet.0"].delta()
    requantised, state = bnb.functional.quantize_4bit(exact, quant_type="nf4", compress_statistics=True)
    assert close(merged, bnb.functional.dequantize_4bit(requantised, state), 1e-6)
