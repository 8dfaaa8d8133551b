"""Token embeddings that come with a LoRA: bundled, beside the file, checked, exported."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save, save_file

from mole_diffusion.errors import BaseMismatch, InvalidFile
from mole_diffusion.experts import Expert, LowRank, check_fits, content_hash, inspect_file, read_header, save_expert
from mole_diffusion.experts.embeddings import (
    MAX_FILE,
    MAX_TOKENS,
    MAX_VECTORS,
    TOKENS_KEY,
    encoder_widths,
    find_misfit,
    shared_tokens,
    to_pivotal,
)
from mole_diffusion.experts.load import content_sha256
from tests.core.small import make_expert, make_sd, make_sdxl, shapes_of
from tests.core.test_experts import Base

Tensors = dict[str, torch.Tensor]

# Origin: OneTrainer modules/modelSaver/stableDiffusionXL/StableDiffusionXLLoRASaver.py, legacy names: kohya's prefixes
# with diffusers' modules. Key → shape.
ONETRAINER = {
    "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn1_to_q.lora_down.weight": (2, 32),
    "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn1_to_q.lora_up.weight": (32, 2),
    "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn1_to_q.alpha": (),
    "lora_te1_text_model_encoder_layers_0_mlp_fc1.lora_down.weight": (2, 16),
    "lora_te1_text_model_encoder_layers_0_mlp_fc1.lora_up.weight": (32, 2),
    "lora_te1_text_model_encoder_layers_0_mlp_fc1.alpha": (),
    "lora_te2_text_projection.lora_down.weight": (2, 16),
    "lora_te2_text_projection.lora_up.weight": (16, 2),
    "lora_te2_text_projection.alpha": (),
    "bundle_emb.<robot.v2>.clip_l": (3, 16),
    "bundle_emb.<robot.v2>.clip_g": (3, 16),
}


def tensors_of(table: dict[str, tuple[int, ...]]) -> Tensors:
    return {key: torch.randn(shape) for key, shape in table.items()}


def lora(**more: torch.Tensor) -> Tensors:
    return {"unet.conv_in.lora_A.weight": torch.randn(2, 4), "unet.conv_in.lora_B.weight": torch.randn(8, 2), **more}


def test_a_onetrainer_file_with_everything() -> None:
    tensors = tensors_of(ONETRAINER)
    expert = Expert.load(save(tensors))
    assert set(expert.modules) == {
        "unet.down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q",
        "text_encoder.encoder.layers.0.mlp.fc1",
        "text_encoder_2.text_projection",
    }
    parts = expert.embeddings["<robot.v2>"]
    assert torch.equal(parts["text_encoder"], tensors["bundle_emb.<robot.v2>.clip_l"])
    assert torch.equal(parts["text_encoder_2"], tensors["bundle_emb.<robot.v2>.clip_g"])
    assert expert.trigger == "<robot.v2>"
    check_fits(expert, Base(make_sdxl()))
    for header_only in (False, True):
        seen = inspect_file(save(tensors), header_only=header_only)
        assert seen.ok and (seen.matched, seen.unmatched) == (11, 0)
        assert seen.embeddings == {"<robot.v2>": 3} and seen.embeddings_from is None
        assert "embeddings of <robot.v2>" in seen.sentence()


def test_bundles_beside_diffusers_names_and_of_a1111() -> None:
    vector = torch.randn(24)
    expert = Expert.load(save(lora(**{"bundle_emb.dog.string_to_param.*": vector})))
    assert torch.equal(expert.embeddings["dog"]["text_encoder"], vector[None])
    both = lora(**{"bundle_emb.a.clip_l": torch.ones(1, 24), "bundle_emb.b.clip_l": torch.ones(2, 24)})
    assert Expert.load(save(both)).trigger is None, "two tokens may mean two things"
    many = {f"bundle_emb.<s{index}>.clip_l": torch.ones(1, 24) for index in range(11)}
    assert Expert.load(save(lora(**many))).trigger == "".join(f"<s{index}>" for index in range(11))


@pytest.mark.parametrize(
    ("bundle", "part"),
    [
        ({"bundle_emb.x.clip_l_out": (1, 8)}, "output embedding"),
        ({"bundle_emb.x.t5": (1, 8)}, "no text encoder of SD or SDXL"),
        ({"bundle_emb.x": (1, 8)}, "no text encoder"),
        ({"bundle_emb..clip_l": (1, 8)}, "no text encoder"),
        ({"bundle_emb.x.clip_l": (1, 8), "bundle_emb.x.string_to_param.*": (1, 8)}, "two embeddings for one encoder"),
        ({"bundle_emb.x.clip_l": (1, 8), "bundle_emb.x.clip_g": (2, 8)}, r"has \[1, 2\] vectors"),
        ({"bundle_emb.x.clip_l": (MAX_VECTORS + 1, 8)}, "1 to 75"),
        ({"bundle_emb.x.clip_l": (0, 8)}, "expected \\(vectors, width\\)"),
        ({"bundle_emb.x.clip_l": (1, 1, 8)}, "expected \\(vectors, width\\)"),
        ({f"bundle_emb.t{index}.clip_l": (1, 8) for index in range(MAX_TOKENS + 1)}, "at most 64 embedded tokens"),
        ({"bundle_emb.<|endoftext|>.clip_l": (1, 8)}, "cannot be a token"),
        ({"bundle_emb.two words.clip_l": (1, 8)}, "cannot be a token"),
        ({"bundle_emb.a\nb.clip_l": (1, 8)}, "cannot be a token"),
        ({f"bundle_emb.{'x' * 65}.clip_l": (1, 8)}, "cannot be a token"),
    ],
)
def test_bundles_that_are_refused(bundle: dict[str, tuple[int, ...]], part: str) -> None:
    data = save({**lora(), **tensors_of(bundle)})
    with pytest.raises(InvalidFile, match=part):
        Expert.load(data)
    assert not inspect_file(data, header_only=True).ok


def test_embeddings_alone_are_no_expert() -> None:
    for alone in (["bundle_emb.x.clip_l"], ["clip_l", "clip_g"], ["text_encoders_0"], ["emb_params"]):
        with pytest.raises(InvalidFile, match="read beside it"):
            Expert.load(save({key: torch.ones(1, 8) for key in alone}))


def pivotal(folder: Path, names: tuple[str, str] = ("clip_l", "clip_g")) -> tuple[Path, Tensors]:
    """Origin: diffusers examples/advanced_diffusion_training; cog-sdxl wrote other names."""
    stacked = {names[0]: torch.randn(2, 16), names[1]: torch.randn(2, 16)}
    save_file(lora(), folder / "hero.safetensors")
    save_file(stacked, folder / "hero_emb.safetensors")
    return folder / "hero.safetensors", stacked


@pytest.mark.parametrize("names", [("clip_l", "clip_g"), ("text_encoders_0", "text_encoders_1")])
def test_a_pivotal_file_beside_the_lora(names: tuple[str, str], tmp_path: Path) -> None:
    path, stacked = pivotal(tmp_path, names)
    expert = Expert.load(path)
    assert list(expert.embeddings) == ["<s0>", "<s1>"] and expert.trigger == "<s0><s1>"
    assert torch.equal(expert.embeddings["<s1>"]["text_encoder_2"], stacked[names[1]][1:])
    files = path.read_bytes() + (tmp_path / "hero_emb.safetensors").read_bytes()
    assert expert.sha256 == hashlib.sha256(files).hexdigest() == content_sha256(path)
    for header_only in (False, True):
        seen = inspect_file(path, header_only=header_only)
        assert seen.sha256 == expert.sha256 and seen.embeddings_from == "hero_emb.safetensors"
        assert "embeddings of <s0>, <s1> from hero_emb.safetensors" in seen.sentence()

    alone = Expert.load(path, embeddings=False)
    assert not alone.embeddings and alone.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert alone.sha256 == content_sha256(path, embeddings=False) != expert.sha256
    data, beside = path.read_bytes(), (tmp_path / "hero_emb.safetensors").read_bytes()
    assert not Expert.load(data).embeddings
    assert Expert.load(data, embeddings=beside).sha256 == expert.sha256
    (tmp_path / "hero_emb.safetensors").rename(tmp_path / "elsewhere.safetensors")
    assert Expert.load(path, embeddings=tmp_path / "elsewhere.safetensors").sha256 == expert.sha256
    assert Expert.load(path, trigger="mine").trigger == "mine"


@pytest.mark.parametrize(
    ("stacked", "stated", "part"),
    [
        ({"clip_l": (2, 8), "clip_g": (3, 8)}, None, "as many for each"),
        ({"clip_l": (2, 8), "t5": (2, 8)}, None, "got 't5'"),
        ({"clip_l": (2, 8), "text_encoders_0": (2, 8)}, None, "second embedding"),
        ({"clip_l": (65, 8)}, None, "at most 64"),
        ({"clip_l": (64 * 75 + 1, 1)}, None, "at most 64"),
        ({"clip_l": (2, 8)}, "{", "malformed"),
        ({"clip_l": (2, 8)}, '[["a", 1, 2]]', "malformed"),
        ({"clip_l": (2, 8)}, '[["a", 3]]', "does not count"),
        ({"clip_l": (2, 8)}, '[["a", true], ["b", 1]]', "does not count"),
        ({"clip_l": (2, 8)}, '[["a", 1], ["a", 1]]', "twice"),
        ({}, None, "no tensors"),
    ],
)
def test_pivotal_files_that_are_refused(
    stacked: dict[str, tuple[int, ...]], stated: str | None, part: str, tmp_path: Path
) -> None:
    save_file(lora(), tmp_path / "x.safetensors")
    save_file(tensors_of(stacked), tmp_path / "x_emb.safetensors", {TOKENS_KEY: stated} if stated else None)
    with pytest.raises(InvalidFile, match=f"x_emb.safetensors cannot be used: .*{part}"):
        Expert.load(tmp_path / "x.safetensors")
    assert Expert.load(tmp_path / "x.safetensors", embeddings=False)


def test_hostile_companions_are_never_opened_or_read_whole(tmp_path: Path) -> None:
    save_file(lora(), tmp_path / "x.safetensors")
    beside = tmp_path / "x_emb.safetensors"
    beside.write_bytes(b"\x80\x04cos\nsystem\n")
    assert "pickle" in inspect_file(tmp_path / "x.safetensors").reason
    save_file({"clip_l": torch.zeros(MAX_FILE // 4 + 1, 1)}, beside)
    assert "at most 64.0 MB" in inspect_file(tmp_path / "x.safetensors").reason
    save_file({"clip_l": torch.full((1, 8), float("nan"))}, beside)
    assert "NaN" in inspect_file(tmp_path / "x.safetensors").reason
    save_file({"clip_l": torch.full((1, 8), 1e200, dtype=torch.float64)}, beside)
    assert "too large for float32" in inspect_file(tmp_path / "x.safetensors").reason


def test_a_token_in_both_places_is_ambiguous(tmp_path: Path) -> None:
    save_file(lora(**{"bundle_emb.<s0>.clip_l": torch.ones(1, 8)}), tmp_path / "x.safetensors")
    save_file({"clip_l": torch.ones(1, 8)}, tmp_path / "x_emb.safetensors")
    with pytest.raises(InvalidFile, match="both define the token '<s0>'"):
        Expert.load(tmp_path / "x.safetensors")


def test_widths_are_compared_with_the_base() -> None:
    sd, sdxl = make_sd(), make_sdxl()
    assert encoder_widths(shapes_of(sd)) == {"text_encoder": 24}
    assert encoder_widths(shapes_of(sdxl)) == {"text_encoder": 16, "text_encoder_2": 16}
    good = {"a": {"text_encoder": torch.ones(2, 24)}}
    assert find_misfit(good, shapes_of(sd)) is None
    assert find_misfit({"a": {"text_encoder": torch.ones(2, 16)}}, shapes_of(sdxl)) == (
        "the token 'a' has vectors for text_encoder (16), the base needs text_encoder (16), text_encoder_2 (16)"
    )
    expert = make_expert(sd, "robot", embeddings={"a": {"text_encoder": torch.ones(1, 25)}})
    with pytest.raises(BaseMismatch, match="does not fit Tiny: the token 'a' has vectors for text_encoder \\(25\\)"):
        check_fits(expert, Base(sd))


def embedded(pipe: Any) -> Expert:
    components = ("text_encoder", "text_encoder_2")
    tokens = {"<hero>": 2, "<cape>": 1}
    return make_expert(
        pipe, "hero", embeddings={t: {c: torch.randn(n, 16) for c in components} for t, n in tokens.items()}
    )


@pytest.mark.parametrize("file_format", ["diffusers", "kohya"])
def test_saved_and_read_back(file_format: Any, tmp_path: Path) -> None:
    expert = embedded(make_sdxl())
    path = save_expert(expert, tmp_path / "r.safetensors", format=file_format)
    again = Expert.load(path)
    assert again.embeddings.keys() == expert.embeddings.keys() and again.modules.keys() == expert.modules.keys()
    for token, parts in expert.embeddings.items():
        assert all(torch.equal(again.embeddings[token][component], value) for component, value in parts.items())
    beside = tmp_path / "r_emb.safetensors"
    assert beside.exists() == (file_format == "diffusers")
    save_expert(expert, path, format=file_format, dtype=torch.float16)
    stored = {dtype for file in tmp_path.iterdir() for dtype, _ in read_header(file).tensors.values()}
    assert stored == {"F16"}


def test_diffusers_reads_both_files_of_its_export(tmp_path: Path) -> None:
    """As its users do: load_lora_weights, then load_textual_inversion for each encoder."""
    vectors = {"<s0>": torch.randn(1, 16), "<s1>": torch.randn(1, 16)}
    embeddings = {t: {"text_encoder": v, "text_encoder_2": 2 * v} for t, v in vectors.items()}
    expert = make_expert(make_sdxl(), "hero", embeddings=embeddings)
    path = save_expert(expert, tmp_path / "r.safetensors")
    pipe = make_sdxl()
    pipe.load_lora_weights(str(tmp_path), weight_name=path.name)
    stacked = load_file(tmp_path / "r_emb.safetensors")
    tokens = [token for token, _ in json.loads(read_header(tmp_path / "r_emb.safetensors").metadata[TOKENS_KEY])]
    for name, tokenizer, encoder, factor in (
        ("clip_l", pipe.tokenizer, pipe.text_encoder, 1),
        ("clip_g", pipe.tokenizer_2, pipe.text_encoder_2, 2),
    ):
        pipe.load_textual_inversion(stacked[name], token=tokens, text_encoder=encoder, tokenizer=tokenizer)
        rows = encoder.get_input_embeddings().weight[tokenizer.convert_tokens_to_ids(tokens)]
        torch.testing.assert_close(rows, factor * torch.cat(list(vectors.values())))


def test_tokens_of_different_encoders_need_kohya() -> None:
    with pytest.raises(InvalidFile, match="export kohya"):
        to_pivotal({"a": {"text_encoder": torch.ones(1, 8)}, "b": {"text_encoder_2": torch.ones(1, 8)}})


def test_tokens_that_two_experts_define_are_found() -> None:
    one, two, three = (
        Expert(name, {}, embeddings={token: {"text_encoder": torch.ones(1, 8)}})
        for name, token in (("a", "<s0>"), ("b", "<s0>"), ("c", "<hero>"))
    )
    assert shared_tokens([one, two, three]) == {"<s0>": ["a", "b"]}


def test_the_content_hash_knows_embeddings() -> None:
    modules = {"unet.x": LowRank(torch.ones(2, 3), torch.ones(4, 2))}
    plain = content_hash(modules)
    assert content_hash(modules, {}) == plain == Expert("a", modules).sha256
    some = {
        content_hash(modules, {t: {"text_encoder": v}}) for t in "ab" for v in (torch.ones(1, 8), torch.zeros(1, 8))
    }
    assert len(some | {plain}) == 5
