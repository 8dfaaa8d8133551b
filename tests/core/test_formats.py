"""Every layout → the canonical form, by tables of keys and shapes with their origin."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import save

from mole_diffusion.errors import InvalidFile
from mole_diffusion.experts import Expert, inspect_file
from mole_diffusion.experts.formats import find_format
from mole_diffusion.experts.names import Resolver, align, sgm_to_diffusers
from mole_diffusion.experts.safefile import read_header
from tests.core.small import generate, make_sd, make_sdxl, run_unet, shapes_of

BLOCK = "down_blocks.1.attentions.0.transformer_blocks.0"

# prefix of a file's keys → canonical key. Origin: the key lists of published files of each producer.
KOHYA = {
    # sd-scripts networks/lora.py, SD 1/2 (diffusers names)
    "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn1_to_q": f"unet.{BLOCK}.attn1.to_q",
    "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn2_to_out_0": f"unet.{BLOCK}.attn2.to_out.0",
    "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_ff_net_0_proj": f"unet.{BLOCK}.ff.net.0.proj",
    "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_ff_net_2": f"unet.{BLOCK}.ff.net.2",
    "lora_unet_up_blocks_3_attentions_2_proj_in": "unet.up_blocks.3.attentions.2.proj_in",
    "lora_unet_mid_block_attentions_0_proj_out": "unet.mid_block.attentions.0.proj_out",
    "lora_te_text_model_encoder_layers_11_self_attn_q_proj": "text_encoder.encoder.layers.11.self_attn.q_proj",
    "lora_te_text_model_encoder_layers_0_mlp_fc2": "text_encoder.encoder.layers.0.mlp.fc2",
    # LyCORIS LoCon and c3lier: convolutions
    "lora_unet_down_blocks_0_resnets_1_conv1": "unet.down_blocks.0.resnets.1.conv1",
    "lora_unet_mid_block_resnets_0_time_emb_proj": "unet.mid_block.resnets.0.time_emb_proj",
    "lora_unet_up_blocks_1_resnets_2_conv_shortcut": "unet.up_blocks.1.resnets.2.conv_shortcut",
    "lora_unet_down_blocks_0_downsamplers_0_conv": "unet.down_blocks.0.downsamplers.0.conv",
    "lora_unet_up_blocks_0_upsamplers_0_conv": "unet.up_blocks.0.upsamplers.0.conv",
    "lora_unet_conv_in": "unet.conv_in",
    "lora_unet_time_embedding_linear_1": "unet.time_embedding.linear_1",
    # SDXL, original names
    "lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_k": (
        "unet.down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_k"
    ),
    "lora_unet_input_blocks_8_1_proj_in": "unet.down_blocks.2.attentions.1.proj_in",
    "lora_unet_middle_block_1_transformer_blocks_9_attn2_to_v": (
        "unet.mid_block.attentions.0.transformer_blocks.9.attn2.to_v"
    ),
    "lora_unet_output_blocks_0_1_transformer_blocks_3_ff_net_2": (
        "unet.up_blocks.0.attentions.0.transformer_blocks.3.ff.net.2"
    ),
    "lora_unet_output_blocks_5_1_proj_out": "unet.up_blocks.1.attentions.2.proj_out",
    "lora_unet_input_blocks_0_0": "unet.conv_in",
    "lora_unet_input_blocks_1_0_in_layers_2": "unet.down_blocks.0.resnets.0.conv1",
    "lora_unet_input_blocks_3_0_op": "unet.down_blocks.0.downsamplers.0.conv",
    "lora_unet_input_blocks_4_0_skip_connection": "unet.down_blocks.1.resnets.0.conv_shortcut",
    "lora_unet_middle_block_0_out_layers_3": "unet.mid_block.resnets.0.conv2",
    "lora_unet_middle_block_2_emb_layers_1": "unet.mid_block.resnets.1.time_emb_proj",
    "lora_unet_output_blocks_2_2_conv": "unet.up_blocks.0.upsamplers.0.conv",
    "lora_unet_output_blocks_8_0_out_layers_3": "unet.up_blocks.2.resnets.2.conv2",
    "lora_unet_time_embed_0": "unet.time_embedding.linear_1",
    "lora_unet_label_emb_0_2": "unet.add_embedding.linear_2",
    "lora_unet_out_2": "unet.conv_out",
    "lora_te1_text_model_encoder_layers_3_self_attn_out_proj": "text_encoder.encoder.layers.3.self_attn.out_proj",
    "lora_te2_text_model_encoder_layers_31_mlp_fc1": "text_encoder_2.text_model.encoder.layers.31.mlp.fc1",
    # OneTrainer trains it
    "lora_te2_text_projection": "text_encoder_2.text_projection",
}
# (down key, up key) → canonical key
DIFFUSERS = {
    # PEFT backend, diffusers ≥ 0.20
    (f"unet.{BLOCK}.attn1.to_q.lora_A.weight", f"unet.{BLOCK}.attn1.to_q.lora_B.weight"): f"unet.{BLOCK}.attn1.to_q",
    ("unet.conv_in.lora_A.default.weight", "unet.conv_in.lora_B.default.weight"): "unet.conv_in",
    # save_lora_weights of then
    (f"unet.{BLOCK}.attn2.to_out.0.lora.down.weight", f"unet.{BLOCK}.attn2.to_out.0.lora.up.weight"): (
        f"unet.{BLOCK}.attn2.to_out.0"
    ),
    # attention processors, diffusers < 0.20
    (
        f"unet.{BLOCK}.attn1.processor.to_q_lora.down.weight",
        f"unet.{BLOCK}.attn1.processor.to_q_lora.up.weight",
    ): f"unet.{BLOCK}.attn1.to_q",
    (
        f"{BLOCK}.attn1.processor.to_out_lora.down.weight",
        f"{BLOCK}.attn1.processor.to_out_lora.up.weight",
    ): f"unet.{BLOCK}.attn1.to_out.0",
    # text towers, with and without text_model.
    (
        "text_encoder.text_model.encoder.layers.0.self_attn.q_proj.lora_linear_layer.down.weight",
        "text_encoder.text_model.encoder.layers.0.self_attn.q_proj.lora_linear_layer.up.weight",
    ): "text_encoder.encoder.layers.0.self_attn.q_proj",
    (
        "text_encoder.encoder.layers.0.mlp.fc1.lora_A.weight",
        "text_encoder.encoder.layers.0.mlp.fc1.lora_B.weight",
    ): "text_encoder.encoder.layers.0.mlp.fc1",
    (
        "text_encoder_2.text_model.encoder.layers.0.self_attn.to_out_lora.down.weight",
        "text_encoder_2.text_model.encoder.layers.0.self_attn.to_out_lora.up.weight",
    ): "text_encoder_2.text_model.encoder.layers.0.self_attn.out_proj",
}


def kohya(prefix: str, alpha: float | None = None, rank: int = 4, conv: bool = False) -> dict[str, torch.Tensor]:
    """One module's tensors."""
    down = torch.randn(rank, 8, 3, 3) if conv else torch.randn(rank, 8)
    up = torch.randn(6, rank, 1, 1) if conv else torch.randn(6, rank)
    tensors = {f"{prefix}.lora_down.weight": down, f"{prefix}.lora_up.weight": up}
    return tensors if alpha is None else {**tensors, f"{prefix}.alpha": torch.tensor(alpha)}


@pytest.mark.parametrize(
    ("key", "layout"),
    [(f"{prefix}.lora_up.weight", "kohya") for prefix in KOHYA]
    + [(key, "diffusers") for keys in DIFFUSERS for key in keys]
    + [(f"base_model.model.{BLOCK}.attn1.to_q.lora_A.weight", "diffusers"), ("unet:0:up", None), ("clip_l", None)],
)
def test_each_layout_knows_its_own_files(key: str, layout: str | None) -> None:
    found = find_format(read_header(save({key: torch.ones(1, 1)})))
    assert (found and found.NAME) == layout


@pytest.mark.parametrize("prefix", KOHYA)
def test_kohya_names(prefix: str) -> None:
    expert = Expert.load(save(kohya(prefix, alpha=2.0)))
    assert list(expert.modules) == [KOHYA[prefix]]
    assert expert.modules[KOHYA[prefix]].scale == 0.5


@pytest.mark.parametrize("keys", DIFFUSERS)
def test_diffusers_names(keys: tuple[str, str]) -> None:
    a, b = torch.randn(4, 8), torch.randn(6, 4)
    expert = Expert.load(save({keys[0]: a, keys[1]: b}))
    pair = expert.modules[DIFFUSERS[keys]]
    assert len(expert.modules) == 1 and pair.scale == 1.0
    assert torch.allclose(pair.delta(), b @ a)


@pytest.mark.parametrize(("alpha", "scale"), [(None, 1.0), (0.0, 1.0), (4.0, 1.0), (1.0, 0.25), (16.0, 4.0)])
def test_kohya_alpha(alpha: float | None, scale: float) -> None:
    """scale = alpha / dim; absent or 0 means dim (sd-scripts networks/lora.py)."""
    expert = Expert.load(save(kohya("lora_unet_conv_in", alpha, conv=True)))
    assert expert.modules["unet.conv_in"].scale == scale


def test_kohya_alphas_and_ranks_per_module() -> None:
    """Where diffusers ignores alphas that differ, and falls back to 1.0."""
    first = "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn1_to_q"
    expert = Expert.load(save({**kohya(first, 1.0, rank=4), **kohya("lora_unet_conv_in", 8.0, rank=2, conv=True)}))
    assert expert.modules[KOHYA[first]].scale == 0.25
    assert expert.modules["unet.conv_in"].scale == 4.0
    assert expert.ranks == {2: 1, 4: 1} and expert.rank_summary == "ranks 2–4"


def merged(pipe: Any, expert: Expert) -> Any:
    """The pipeline with W + scale · B A, computed here."""
    for key, pair in expert.modules.items():
        component, _, path = key.partition(".")
        weight = getattr(pipe, component).get_submodule(path).weight
        weight.data += pair.scale * (pair.b @ pair.a.flatten(1)).reshape(weight.shape)
    return pipe


def random_kohya(pipe: Any, *, prefixes: dict[str, str], ends: tuple[str, ...], alphas: tuple[float, ...]) -> Any:
    """kohya's prefixes with the pipeline's own module names, as OneTrainer's legacy format has them."""
    torch.manual_seed(2)
    tensors: dict[str, torch.Tensor] = {}
    chosen = [(k, s) for k, s in shapes_of(pipe).items() if k.endswith(ends) and k.partition(".")[0] in prefixes]
    for index, (key, shape) in enumerate(chosen):
        component, _, path = key.partition(".")
        tower = "text_model." if component.startswith("text") and path != "text_projection" else ""
        name = f"{prefixes[component]}_{tower}{path.removeprefix('text_model.')}".replace(".", "_")
        kernel = (1, 1) if len(shape) == 4 else ()
        tensors[f"{name}.lora_down.weight"] = 0.3 * torch.randn(2, *shape[1:])
        tensors[f"{name}.lora_up.weight"] = 0.3 * torch.randn(shape[0], 2, *kernel)
        tensors[f"{name}.alpha"] = torch.tensor(alphas[index % len(alphas)])
    return tensors


def test_onetrainer_names_and_the_text_projection_give_what_diffusers_gives(tmp_path: Path) -> None:
    """SDXL, both encoders and the projection, one alpha for all: where diffusers converts correctly.

    Attention of the text towers is left out: with transformers 5 diffusers 0.42 drops it with a warning.
    """
    prefixes = {"unet": "lora_unet", "text_encoder": "lora_te1", "text_encoder_2": "lora_te2"}
    ends = ("attn2.to_q", "attn1.to_out.0", "fc1", "text_projection")
    tensors = random_kohya(make_sdxl(), prefixes=prefixes, ends=ends, alphas=(1.0,))
    path = tmp_path / "x.safetensors"
    path.write_bytes(save(tensors))
    expert = Expert.load(path, shapes=shapes_of(make_sdxl()))
    assert "lora_te2_text_projection.alpha" in tensors and "text_encoder_2.text_projection" in expert.modules
    assert 3 * len(expert.modules) == len(tensors) and {pair.scale for pair in expert.modules.values()} == {0.5}
    theirs = make_sdxl()
    theirs.load_lora_weights(str(tmp_path), weight_name=path.name)
    ours = generate(merged(make_sdxl(), expert))
    assert (ours - generate(make_sdxl())).abs().max() > 0.01
    torch.testing.assert_close(ours, generate(theirs), atol=1e-5, rtol=1e-5)


@pytest.mark.filterwarnings("ignore:The following alpha_pattern keys")
def test_alphas_that_differ_follow_the_definition_where_diffusers_does_not(tmp_path: Path) -> None:
    """alpha / dim per module; alpha 0 means dim. diffusers loses them on attention."""
    tensors = random_kohya(make_sd(), prefixes={"unet": "lora_unet"}, ends=("to_q", "to_v"), alphas=(0.5, 2.0, 0.0))
    path = tmp_path / "x.safetensors"
    path.write_bytes(save(tensors))
    pipe, theirs = make_sd(), make_sd()
    for key in [key for key in tensors if key.endswith("alpha")]:
        name = key.removesuffix(".alpha")
        up, down = tensors[f"{name}.lora_up.weight"], tensors[f"{name}.lora_down.weight"]
        layers = {f"lora_unet_{n}".replace(".", "_"): m for n, m in pipe.unet.named_modules() if n}
        layers[name].weight.data += (float(tensors[key]) or 2.0) / 2 * up @ down
    expected = run_unet(pipe)
    torch.testing.assert_close(run_unet(merged(make_sd(), Expert.load(path))), expected, atol=1e-5, rtol=1e-5)
    theirs.load_lora_weights(str(tmp_path), weight_name=path.name)
    assert (run_unet(theirs) - expected).abs().max() > 0.01


def test_order_of_keys_does_not_matter() -> None:
    tensors = {
        **kohya("lora_unet_conv_in", 1.0, conv=True),
        **kohya("lora_te_text_model_encoder_layers_0_mlp_fc1", 2.0),
    }
    one, two = Expert.load(save(tensors)), Expert.load(save(dict(reversed(list(tensors.items())))))
    assert all(torch.equal(one.modules[key].delta(), two.modules[key].delta()) for key in one.modules)


def test_adapter_metadata_gives_the_scale() -> None:
    """As diffusers ≥ 0.35 writes it; alpha_pattern by suffix, rsLoRA by root of the rank."""
    tensors = {}
    for path in (f"{BLOCK}.attn1.to_q", f"{BLOCK}.attn1.to_k", f"{BLOCK}.ff.net.2"):
        tensors[f"unet.{path}.lora_A.weight"] = torch.randn(4, 8)
        tensors[f"unet.{path}.lora_B.weight"] = torch.randn(6, 4)
    config: dict[str, Any] = {"unet.r": 4, "unet.lora_alpha": 2, "unet.alpha_pattern": {"to_k": 8, "ff.net.2": 1}}
    expert = Expert.load(save(tensors, {"lora_adapter_metadata": json.dumps(config)}))
    assert [round(pair.scale, 4) for _, pair in sorted(expert.modules.items())] == [2.0, 0.5, 0.25]
    rooted = json.dumps({**config, "unet.use_rslora": True})
    assert (
        Expert.load(save(tensors, {"lora_adapter_metadata": rooted})).modules[f"unet.{BLOCK}.attn1.to_q"].scale == 1.0
    )


def test_fields_of_tomorrow_in_the_adapter_metadata_change_nothing() -> None:
    """diffusers gives a TypeError; the scale is defined by the fields that we know."""
    tensors = {f"unet.{BLOCK}.attn1.to_q.lora_A.weight": torch.randn(4, 8)}
    tensors[f"unet.{BLOCK}.attn1.to_q.lora_B.weight"] = torch.randn(6, 4)
    known = {"unet.r": 4, "unet.lora_alpha": 2}
    for config in (known, {**known, "unet.new_field": {"a": [1]}, "another": None, "vae.lora_alpha": 9}):
        pair = Expert.load(save(tensors, {"lora_adapter_metadata": json.dumps(config)})).modules.popitem()[1]  # type: ignore[attr-defined]
        assert pair.scale == 0.5


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("{", "not JSON"),
        ("[]", "not a JSON object"),
        ('{"unet.lora_alpha": 4, "unet.use_dora": true}', "no lora_magnitude_vector"),
        ('{"unet.lora_alpha": "x"}', "finite number"),
        ('{"unet.lora_alpha": 1' + "0" * 400 + "}", "finite number"),
        ('{"unet.lora_alpha": 4, "unet.lora_bias": true}', "biases"),
    ],
)
def test_bad_adapter_metadata(text: str, part: str) -> None:
    tensors = {"unet.conv_in.lora_A.weight": torch.ones(2, 4), "unet.conv_in.lora_B.weight": torch.ones(8, 2)}
    with pytest.raises(InvalidFile, match=part):
        Expert.load(save(tensors, {"lora_adapter_metadata": text}))


def test_peft_save_pretrained_without_its_config_is_refused() -> None:
    prefix = f"base_model.model.{BLOCK}.attn1.to_q"
    tensors = {f"{prefix}.lora_A.weight": torch.ones(2, 4), f"{prefix}.lora_B.weight": torch.ones(8, 2)}
    with pytest.raises(InvalidFile, match=r"adapter_config\.json"):
        Expert.load(save(tensors))
    expert = Expert.load(save(tensors, {"lora_adapter_metadata": json.dumps({"r": 2, "lora_alpha": 4})}))
    assert expert.modules[f"unet.{BLOCK}.attn1.to_q"].scale == 2.0


@pytest.mark.parametrize(
    "options", [{}, {"use_rslora": True}, {"alpha_pattern": {"to_k": 1}, "rank_pattern": {"to_k": 3}}]
)
def test_a_folder_of_peft_is_read_with_its_own_scales(options: dict[str, Any], pipe: Any, tmp_path: Path) -> None:
    asked = LoraConfig(r=2, lora_alpha=5, target_modules=["to_q", "to_k"], init_lora_weights=False, **options)
    model = get_peft_model(copy.deepcopy(pipe.unet), asked)
    model.save_pretrained(str(tmp_path / "hero"))
    expert = Expert.load(tmp_path / "hero")
    assert expert.name == "hero" and inspect_file(tmp_path / "hero").ok
    layers = {f"unet.{n}": m for n, m in model.base_model.model.named_modules() if hasattr(m, "get_delta_weight")}
    assert expert.modules.keys() == layers.keys()
    for key, pair in expert.modules.items():
        torch.testing.assert_close(pair.delta(), layers[key].get_delta_weight("default"), atol=1e-6, rtol=1e-5)
    config = tmp_path / "hero" / "adapter_config.json"
    changed = json.loads(config.read_text()) | {"lora_alpha": 7}
    config.write_text(json.dumps(changed))
    assert Expert.load(tmp_path / "hero").sha256 != expert.sha256, "the scale belongs to the content"
    for wrong, part in (({"alpha_pattern": {"attn[12].to_q": 8}}, "no plain module name"),
                        ({"init_lora_weights": "pissa"}, "changed base")):  # fmt: skip
        config.write_text(json.dumps(changed | wrong))
        with pytest.raises(InvalidFile, match=part):
            Expert.load(tmp_path / "hero")
    config.write_text(json.dumps(changed | {"peft_type": "IA3"}))
    with pytest.raises(InvalidFile, match="IA3"):
        Expert.load(tmp_path / "hero")
    (tmp_path / "hero" / "adapter_model.safetensors").rename(tmp_path / "hero" / "adapter_model.bin")
    assert "pickle" in inspect_file(tmp_path / "hero").reason


@pytest.mark.parametrize(
    ("keys", "parts"),
    [
        # LyCORIS train_norm
        (["lora_unet_mid_block_resnets_0_norm1.w_norm", "lora_unet_mid_block_resnets_0_norm1.b_norm"],
         ["trained normalisation layers", "1 of 4 tensors", "norm1.w_norm"]),
        # LyCORIS full, sd-scripts with biases
        (["lora_unet_conv_in.diff_b"], ["trained biases", "1 of 3 tensors", "conv_in.diff_b"]),
        # PEFT lora_bias
        (["unet.conv_in.lora_B.bias"], ["trained biases", "1 of 3 tensors"]),
        # cloneofsimo/lora save_safeloras
        (["unet:0:up", "unet:0:down", "text_encoder:0:up"], ["numbers instead of module names", "'unet:0:up'"]),
        (["lora_unet_conv_in.oft_blocks"], ["OFT", "rotation"]),
    ],
)  # fmt: skip
def test_what_is_no_low_rank_pair_is_refused_with_its_keys_and_the_reason(keys: list[str], parts: list[str]) -> None:
    data = save({**kohya("lora_unet_conv_out"), **{key: torch.zeros(2, 2) for key in keys}})
    for header_only in (False, True):
        seen = inspect_file(data, header_only=header_only)
        assert not seen.ok and all(part in seen.reason for part in parts), seen.reason


@pytest.mark.parametrize(
    "key",
    [
        "lora_unet_no_such_module.lora_down.weight",
        "lora_unet_conv_in.lora_down.bias",
        "lora_te9_text_model_encoder_layers_0_mlp_fc1.lora_down.weight",
        "unet.conv_in.lora_A.bias",
        "something",
    ],
)
def test_a_key_that_nobody_understands_refuses_the_file(key: str) -> None:
    with pytest.raises(InvalidFile, match="1 of 4 tensors"):
        Expert.load(save({**kohya("lora_unet_conv_out", 1.0), key: torch.ones(2)}))


def test_half_a_pair_refuses_the_file() -> None:
    tensors = {**kohya("lora_unet_conv_in", conv=True), "lora_unet_conv_out.lora_down.weight": torch.ones(2, 4)}
    with pytest.raises(InvalidFile, match="lora_unet_conv_out"):
        Expert.load(save(tensors))


@pytest.mark.parametrize(
    ("down", "up", "part"),
    [
        ((2, 4), (6, 3), "low-rank pair"),
        ((2, 4, 3), (6, 2), "low-rank pair"),
        ((1025, 2), (2, 1025), "rank between"),
        ((0, 4), (6, 0), "rank between"),
        ((2, 4, 3, 3), (6, 2, 3, 3), "1×1 convolution"),
    ],
)
def test_impossible_shapes(down: tuple[int, ...], up: tuple[int, ...], part: str) -> None:
    tensors = {
        "lora_unet_conv_in.lora_down.weight": torch.ones(down),
        "lora_unet_conv_in.lora_up.weight": torch.ones(up),
    }
    with pytest.raises(InvalidFile, match=part):
        Expert.load(save(tensors))


def test_same_weight_twice_is_ambiguous() -> None:
    one = "lora_te_text_model_encoder_layers_0_mlp_fc1"
    with pytest.raises(InvalidFile, match="twice"):
        Expert.load(save({**kohya(one), **kohya("lora_te1_text_model_encoder_layers_0_mlp_fc1")}))


def test_float64_is_read_as_float32() -> None:
    tensors = {key: value.double() for key, value in kohya("lora_unet_conv_in", conv=True).items()}
    assert Expert.load(save(tensors)).modules["unet.conv_in"].a.dtype == torch.float32


def test_every_module_of_both_pipelines_resolves_by_grammar_and_by_shapes(pipe: Any) -> None:
    """Flattened names → exactly the real names, with and without knowing them."""
    shapes = shapes_of(pipe)
    known, grammar = Resolver(shapes), Resolver()
    for key in shapes:
        component, _, path = key.partition(".")
        flat = path.replace(".", "_")
        assert known.key(component, flat) == key
        assert known.key(component, f"text_model_{flat}" if component == "text_encoder" else flat) == key
        assert grammar.key(component, flat) == key


def test_original_names_follow_the_layers_of_the_base(sdxl: Any) -> None:
    """The tiny SDXL has one ResNet per down block, the published one two."""
    known = Resolver(shapes_of(sdxl))
    assert known.layers == 1
    assert known.key("unet", "input_blocks_3_1_transformer_blocks_1_attn1_to_q") == (
        "unet.down_blocks.1.attentions.0.transformer_blocks.1.attn1.to_q"
    )
    assert known.key("unet", "output_blocks_1_2_conv") == "unet.up_blocks.0.upsamplers.0.conv"
    assert known.key("unet", "input_blocks_9_1_proj_in") is None


def test_original_names_of_the_published_sdxl_are_all_found() -> None:
    """Every one of 9 + 1 + 9 places of the SDXL UNet lands on a diffusers name."""
    places = [f"input_blocks_{i}_0_in_layers_2" for i in (1, 2, 4, 5, 7, 8)] + [
        f"input_blocks_{i}_0_op" for i in (3, 6)
    ]
    places += [f"output_blocks_{i}_0_in_layers_2" for i in range(9)] + [f"output_blocks_{i}_2_conv" for i in (2, 5)]
    found = {sgm_to_diffusers(place, 2) for place in places}
    assert len(found) == len(places) and None not in found
    assert all(Resolver().key("unet", place) for place in places)


def test_align_accepts_both_spellings() -> None:
    assert align("text_encoder.encoder.x", {"text_encoder.text_model.encoder.x"}) == "text_encoder.text_model.encoder.x"
    assert align("text_encoder.text_model.encoder.x", {"text_encoder.encoder.x"}) == "text_encoder.encoder.x"
    assert align("unet.a", {"unet.b"}) is None and align("text_encoder.a", {"text_encoder.b"}) is None


def original_sdxl_names() -> list[str]:
    """Every linear and convolution layer of the SDXL UNet, as generative-models (sgm) names it, flattened."""
    resnet = ("in_layers_2", "emb_layers_1", "out_layers_3")
    attention = [f"{attn}_{leaf}" for attn in ("attn1", "attn2") for leaf in ("to_q", "to_k", "to_v", "to_out_0")]
    depths = {4: 2, 5: 2, 7: 10, 8: 10}
    names = ["input_blocks_0_0", "time_embed_0", "time_embed_2", "label_emb_0_0", "label_emb_0_2", "out_2"]
    names += [f"input_blocks_{i}_0_{leaf}" for i in (1, 2, 4, 5, 7, 8) for leaf in resnet]
    names += [f"input_blocks_{i}_0_skip_connection" for i in (4, 7)] + [f"input_blocks_{i}_0_op" for i in (3, 6)]
    names += [f"middle_block_{i}_{leaf}" for i in (0, 2) for leaf in resnet]
    names += [f"output_blocks_{i}_0_{leaf}" for i in range(9) for leaf in (*resnet, "skip_connection")]
    names += [f"output_blocks_{i}_2_conv" for i in (2, 5)]
    places = {f"input_blocks_{i}_1": depth for i, depth in depths.items()} | {"middle_block_1": 10}
    places |= {f"output_blocks_{i}_1": 10 if i < 3 else 2 for i in range(6)}
    for place, depth in places.items():
        names += [f"{place}_proj_in", f"{place}_proj_out"]
        for i in range(depth):
            names += [f"{place}_transformer_blocks_{i}_{leaf}" for leaf in (*attention, "ff_net_0_proj", "ff_net_2")]
    return names


def test_original_names_cover_the_published_sdxl_exactly() -> None:
    """794 layers, each by one name, with and without the base (the same names as diffusers 0.42.1 gives them)."""
    from mole_diffusion.bases import get_base

    shapes = get_base("sdxl").module_shapes()
    names = original_sdxl_names()
    for resolver in (Resolver(), Resolver(shapes)):
        found = [resolver.key("unet", name) for name in names]
        assert len(set(found)) == len(found) == 794
        assert set(found) == {key for key in shapes if key.startswith("unet.")}
    grammar = Resolver()
    for key in shapes:
        component, _, path = key.partition(".")
        assert grammar.key(component, path.replace(".", "_")) == key


def header_cases() -> dict[str, tuple[dict[str, torch.Tensor], dict[str, str]]]:
    """Whole files of every layout, small."""
    q = "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn2_to_k"
    path = f"unet.{BLOCK}.attn2.to_k"
    config = {"lora_adapter_metadata": json.dumps({"unet.r": 4, "unet.lora_alpha": 2})}
    loha = {f"{q}.hada_w{n}_{side}": torch.ones(2, 2) for n in "12" for side in "ab"}
    lokr = {f"{q}.lokr_w1": torch.ones(1, 1), f"{q}.lokr_w2_a": torch.ones(6, 2), f"{q}.lokr_w2_b": torch.ones(2, 768)}
    wide = {f"{q}.lora_down.weight": torch.ones(4, 1024), f"{q}.lora_up.weight": torch.ones(6, 4)}
    named = {f"{path}.lora_A.weight": torch.ones(4, 2048), f"{path}.lora_B.weight": torch.ones(6, 4)}
    half = torch.tensor(0.5)
    tags = {"ss_tag_frequency": '{"a": {"sks": 1}}'}
    return {
        "kohya": ({**wide, f"{q}.alpha": half, f"{q}.dora_scale": torch.ones(6, 1)}, tags),
        "diffusers": (named, config),
        "loha": ({**loha, f"{q}.alpha": torch.tensor(2.0)}, {}),
        "lokr": (lokr, {}),
        "diff": ({f"{q}.diff": torch.ones(6, 768)}, {}),
        "in part": ({**wide, "what.else": torch.ones(3)}, {}),
        "bf16": ({key: value.bfloat16() for key, value in {**wide, f"{q}.alpha": half}.items()}, {}),
    }  # fmt: skip


@pytest.mark.parametrize("case", header_cases())
def test_the_header_alone_says_the_same(case: str, tmp_path: Path) -> None:
    tensors, metadata = header_cases()[case]
    path = tmp_path / "x.safetensors"
    path.write_bytes(save(tensors, metadata or None))
    whole, header = inspect_file(path).to_json(), inspect_file(path, header_only=True).to_json()
    assert header.pop("header_only") and not whole.pop("header_only")
    assert header == whole and whole["ranks"] and whole["sha256"]


def test_the_header_alone_does_not_know_how_near_a_pair_is_and_does_not_read_weights(tmp_path: Path) -> None:
    q = "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn2_to_k"
    path = tmp_path / "x.safetensors"
    path.write_bytes(save({f"{q}.diff": torch.full((300, 400), float("nan"))}))
    seen = inspect_file(path, header_only=True)
    assert seen.ok and seen.approximated == 1 and seen.error is None and seen.ranks == {256: 1}
    assert "1 of 1 modules as their nearest pair," in seen.sentence() and json.dumps(seen.to_json())
    assert "NaN" in inspect_file(path).reason
    path.write_bytes(save({**kohya(q), f"{q}.alpha": torch.tensor(float("inf"))}))
    assert "NaN or infinity" in inspect_file(path, header_only=True).reason
