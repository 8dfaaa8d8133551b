"""MoSLoRA's files: what goes on with training, what other tools see, and the plain LoRA that comes out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import nn

from mole_diffusion.adapters import (
    MoSLoraConfig,
    add_moslora,
    fold,
    fold_modules,
    fold_state,
    load_moslora,
    register_moslora,
    save_moslora,
)
from mole_diffusion.errors import InvalidFile
from mole_diffusion.experts import Expert, inspect_file, save_expert
from tests.core.mosaic import attached, close, config, moslora_unet, pictures, toy, train
from tests.core.small import make_sd, run_unet

# --- files -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["kaiming", "butterfly"])
def test_a_state_goes_on_where_it_stopped(kind: str) -> None:
    model = add_moslora(toy(), config(mixer_init=kind))
    train(model)
    torch.manual_seed(9)
    other = add_moslora(toy(), config(mixer_init=kind))
    result = set_peft_model_state_dict(other, get_peft_model_state_dict(model))
    assert not result.unexpected_keys and not [key for key in result.missing_keys if "lora_" in key]
    for _ in range(2):
        left, right = get_peft_model_state_dict(model), get_peft_model_state_dict(other)
        assert list(left) == list(right) and all(torch.equal(left[key], right[key]) for key in left)
        assert torch.equal(model(pictures()), other(pictures()))
        train(model)
        train(other)


@pytest.mark.parametrize("own", [True, False])
def test_folders_keep_the_mixer(tmp_path: Path, own: bool) -> None:
    model = attached(mixer_init="orthogonal")
    if own:
        save_moslora(model, tmp_path)
    else:
        model.save_pretrained(tmp_path)
    loaded = load_moslora(toy(), tmp_path, trainable=True)
    assert isinstance(loaded, PeftModel) and loaded.peft_config["default"].mixer_init == "orthogonal"
    assert torch.equal(loaded.eval()(pictures()), model(pictures()))
    assert sum(value.requires_grad for value in loaded.parameters()) == 9
    frozen = load_moslora(loaded, tmp_path, adapter_name="again")
    assert not any(value.requires_grad for name, value in frozen.named_parameters() if ".again." in name)
    assert torch.equal(frozen(pictures()), model(pictures()))


@pytest.mark.parametrize("kind", ["kaiming", "butterfly"])
@pytest.mark.parametrize("late", [True, False])
def test_pefts_own_loading_works_once_registered(tmp_path: Path, kind: str, late: bool) -> None:
    model = attached(mixer_init=kind)
    model.save_pretrained(tmp_path)
    settings = register_moslora(MoSLoraConfig.from_pretrained(str(tmp_path)))
    loaded = PeftModel.from_pretrained(toy(), str(tmp_path), config=settings, low_cpu_mem_usage=late)
    assert torch.equal(loaded(pictures()), model(pictures()))


def test_a_folder_of_another_model_changes_nothing(tmp_path: Path) -> None:
    save_moslora(attached(), tmp_path)
    weights = tmp_path / "adapter_model.safetensors"
    state = load_file(weights)
    save_file({key: value for key, value in state.items() if "linear.lora_mixer.weight" not in key}, weights)
    model = toy()
    with pytest.raises(InvalidFile, match=r"1 tensors .*linear\.lora_mixer\.weight.* nothing was loaded"):
        load_moslora(model, tmp_path)
    assert list(model.state_dict()) == list(toy().state_dict()) and type(model.linear) is nn.Linear
    get_peft_model(toy(), LoraConfig(target_modules=["linear"])).save_pretrained(tmp_path)
    with pytest.raises(InvalidFile, match="names no mixer"):
        load_moslora(toy(), tmp_path)
    with pytest.raises(InvalidFile, match="cannot read"):
        load_moslora(toy(), tmp_path / "absent")


def test_other_tools_find_nothing_to_apply_in_an_unfolded_file(tmp_path: Path) -> None:
    save_moslora(attached(), tmp_path)
    assert not [key for key in load_file(tmp_path / "adapter_model.safetensors") if "lora_A" in key or "lora_B" in key]
    with pytest.warns(UserWarning, match="mixer_init"):
        blind = PeftModel.from_pretrained(toy(), str(tmp_path))
    assert torch.equal(blind(pictures()), toy()(pictures()))


def test_stock_diffusers_does_not_load_an_unfolded_state(tmp_path: Path) -> None:
    from diffusers import StableDiffusionPipeline
    from diffusers.utils import convert_state_dict_to_diffusers

    state = get_peft_model_state_dict(moslora_unet().unet, adapter_name="subject")
    base = run_unet(make_sd())
    with pytest.raises(ValueError, match="infer state dict type"):
        convert_state_dict_to_diffusers(state)
    for extra in ({}, {"unet_lora_adapter_metadata": {"r": 4, "mixer_init": "kaiming"}}):
        StableDiffusionPipeline.save_lora_weights(tmp_path, unet_lora_layers=state, **extra)
        fresh = make_sd()
        with pytest.raises((IndexError, TypeError)):
            fresh.load_lora_weights(tmp_path)
        assert torch.equal(run_unet(fresh), base)
    bare = make_sd()
    bare.load_lora_weights(dict(state))  # names without "unet." belong to no part of the pipeline
    assert torch.equal(run_unet(bare), base)


def test_our_own_loader_refuses_an_unfolded_file(tmp_path: Path) -> None:
    pipe = moslora_unet()
    save_moslora(pipe.unet, tmp_path, adapter_name="subject")
    found = inspect_file(tmp_path)
    assert not found.ok and "MoSLoRA" in found.reason and "fold the mixer in on export" in found.reason
    for source in (tmp_path, tmp_path / "adapter_model.safetensors"):
        with pytest.raises(InvalidFile, match="fold the mixer in"):
            Expert.load(source)


# --- folding ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("format", "kind"), [("diffusers", "kaiming"), ("kohya", "butterfly")])
def test_stock_diffusers_draws_the_same_from_the_folded_file(tmp_path: Path, format: Any, kind: str) -> None:
    pipe = moslora_unet(mixer_init=kind)
    wanted = run_unet(pipe)
    assert not close(wanted, run_unet(make_sd()), 0.05)
    pipe.unet.fuse_lora()
    assert close(run_unet(pipe), wanted)
    pipe.unet.unfuse_lora()
    assert close(run_unet(pipe), wanted)

    expert = fold(pipe.unet, "subject", adapter_name="subject", trigger="zwx robot")
    assert expert.trigger == "zwx robot" and expert.ranks[2] == 1
    path = save_expert(expert, tmp_path / "folded.safetensors", format=format)
    stock = make_sd()
    stock.load_lora_weights(str(path))
    assert close(run_unet(stock), wanted)
    again = Expert.load(path)
    assert set(again.modules) == set(expert.modules)
    assert all(close(again.modules[key].delta(), pair.delta(), 1e-6) for key, pair in expert.modules.items())


def test_a_unet_reads_its_folder_again_and_gives_the_base_back(tmp_path: Path) -> None:
    pipe = moslora_unet(mixer_init="normal")
    save_moslora(pipe.unet, tmp_path, adapter_name="subject")
    other = make_sd()
    keys = list(other.unet.state_dict())
    assert load_moslora(other.unet, tmp_path, adapter_name="subject") is other.unet
    assert torch.equal(run_unet(other), run_unet(pipe))
    other.unet.unload_lora()
    assert list(other.unet.state_dict()) == keys
    assert torch.equal(run_unet(other), run_unet(make_sd()))


def test_unet_and_text_tower_fold_into_one_file(tmp_path: Path) -> None:
    pipe, ids = moslora_unet(), torch.arange(10)[None]
    tower = attached("subject", pipe.text_encoder, target_modules=["q_proj", "v_proj"])
    modules = fold_modules(pipe.unet, adapter_name="subject")
    modules |= fold_modules(tower, adapter_name="subject", component="text_encoder")
    stock = make_sd()
    stock.load_lora_weights(str(save_expert(modules, tmp_path / "both.safetensors")))
    assert close(run_unet(stock), run_unet(pipe))
    wanted = tower(input_ids=ids)[0]
    assert close(stock.text_encoder(ids)[0], wanted) and not close(make_sd().text_encoder(ids)[0], wanted, 0.1)


def test_folding_a_file_equals_folding_the_model(tmp_path: Path) -> None:
    pipe = moslora_unet(use_rslora=True)
    save_moslora(pipe.unet, tmp_path, adapter_name="subject")
    state = load_file(tmp_path / "adapter_model.safetensors")
    settings = MoSLoraConfig.from_pretrained(str(tmp_path))
    from_file, from_model = fold_state(state, settings), fold_modules(pipe.unet, adapter_name="subject")
    assert set(from_file) == set(from_model)
    for key, pair in from_model.items():
        assert torch.equal(from_file[key].a, pair.a) and torch.equal(from_file[key].b, pair.b)
        assert from_file[key].scale == pytest.approx(pair.scale, rel=1e-12)
    with pytest.raises(InvalidFile, match="lora_A"):
        fold_state({"conv_in.lora_A.weight": torch.ones(2, 2)}, settings)
    with pytest.raises(InvalidFile, match="got A alone"):
        fold_state({"conv_in.lora_mixer.A": torch.ones(2, 2)}, settings)


def test_a_text_model_of_transformers(tmp_path: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    def llama() -> Any:
        torch.manual_seed(0)
        sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
        return LlamaForCausalLM(LlamaConfig(vocab_size=11, num_key_value_heads=2, **sizes)).eval()

    tokens = torch.arange(8)[None]
    model = attached(model=llama(), target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM")
    wanted = model(input_ids=tokens).logits
    model.save_pretrained(tmp_path)
    assert torch.equal(load_moslora(llama(), tmp_path)(input_ids=tokens).logits, wanted)
    folded = fold_modules(model, component="text")
    assert len(folded) == 4 and "text.model.layers.0.mlp.down_proj" in folded
    plain = llama()
    for path, pair in folded.items():
        plain.get_submodule(path.removeprefix("text.")).weight.data += pair.delta()
    assert close(plain(input_ids=tokens).logits, wanted)
    assert close(model.merge_and_unload()(input_ids=tokens).logits, wanted)
