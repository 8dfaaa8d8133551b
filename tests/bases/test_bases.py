from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from mole_diffusion.bases import BASES, Base, assets_dir, get_base
from mole_diffusion.bases.config_files import build_on_meta
from mole_diffusion.errors import InvalidFile, InvalidRequest
from tests.tiny import tiny_sd, tiny_sdxl


@pytest.fixture(scope="module")
def sdxl_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sdxl")
    tiny_sdxl().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def pipe(assets_folder: Path) -> Any:
    """The tiny demo pipeline, loaded once: tests here only read it."""
    return get_base(assets_folder / "demo" / "base").load()


@pytest.fixture
def demo(demo_assets: Path) -> Base:
    return get_base("demo")


def test_the_demo_base_is_what_its_folder_says(demo: Base, demo_assets: Path) -> None:
    assert (demo.name, demo.family, demo.prediction_type) == ("demo", "demo", "v_prediction")
    assert (demo.resolution, demo.latent_channels, demo.size_multiple) == (64, 8, 8)
    assert demo.guidance_rescale == 0.7
    assert demo.alignment_model == f"local-dir:{demo_assets}/demo/clip" and demo.alignment_label == "demo CLIP"
    assert assets_dir() == demo_assets
    assert demo.on_slots and not get_base(demo_assets / "demo" / "base").on_slots, "a folder's own world is unknown"


@pytest.mark.parametrize(
    ("name", "prediction", "resolution", "unet", "towers"),
    [
        ("sd21", "v_prediction", 768, 865_910_724, {"text_encoder": 340_387_840}),
        ("sd21-base", "epsilon", 512, 865_910_724, {"text_encoder": 340_387_840}),
        ("sdxl", "epsilon", 1024, 2_567_463_684, {"text_encoder": 123_060_480, "text_encoder_2": 694_659_840}),
    ],
)
def test_shipped_configurations_have_the_published_sizes(
    name: str, prediction: str, resolution: int, unet: int, towers: dict[str, int]
) -> None:
    base = get_base(name)
    assert (base.prediction_type, base.resolution, base.latent_channels) == (prediction, resolution, 4)
    assert base.components == ("unet", *towers)
    for component, count in {"unet": unet, **towers}.items():
        module = build_on_meta(component, base.configs()[component])
        assert sum(weight.numel() for weight in module.parameters()) == count


def test_module_shapes_need_no_weights_and_no_network() -> None:
    shapes = get_base("sdxl").module_shapes()
    key = "unet.mid_block.attentions.0.transformer_blocks.9.attn2.to_k"
    assert shapes[key] == (1280, 2048)
    assert shapes["unet.down_blocks.1.resnets.0.conv1"] == (640, 320, 3, 3)
    assert shapes["text_encoder_2.text_projection"] == (1280, 1280)
    assert len(get_base("sdxl").block_paths()) == 70 + 17


@pytest.mark.parametrize("kind", ["demo", "sdxl"])
def test_module_shapes_equal_the_loaded_pipeline(kind: str, demo: Base, pipe: Any, sdxl_folder: Path) -> None:
    base = demo if kind == "demo" else get_base(sdxl_folder)
    pipe = pipe if kind == "demo" else base.load()
    found = {
        f"{component}.{path}": tuple(module.weight.shape)
        for component in base.components
        for path, module in getattr(pipe, component).named_modules()
        if isinstance(module, nn.Linear | nn.Conv2d)
    }
    assert base.module_shapes() == found
    assert set(base.block_paths()) <= {path for path, _ in pipe.unet.named_modules()}


def test_targets_are_existing_modules(demo: Base) -> None:
    paths = demo.target_paths()
    assert {path.rsplit(".", 1)[-1] for path in paths} == {"to_q", "to_k", "to_v", "0", "proj", "2", "conv1", "conv2"}
    assert all(f"unet.{path}" in demo.module_shapes() for path in paths)
    assert all("attn" in path for path in get_base("sdxl").target_paths())


def test_a_loaded_pipeline_is_frozen_and_never_clips(demo: Base, pipe: Any) -> None:
    assert not any(weight.requires_grad for weight in pipe.unet.parameters()) and not pipe.unet.training
    assert pipe.scheduler.config["clip_sample"] is False and float(pipe.scheduler.alphas_cumprod[-1]) == 0
    assert demo.load(dtype=torch.bfloat16).unet.dtype == torch.bfloat16


def test_local_folders_are_recognised_by_their_configurations(sdxl_folder: Path, tmp_path: Path) -> None:
    base = get_base(str(sdxl_folder))
    assert (base.family, base.prediction_type, base.alignment_label) == ("sdxl", "epsilon", "OpenCLIP ViT-B/32")
    tiny_sd("epsilon").save_pretrained(tmp_path)
    base = get_base(tmp_path)
    assert (base.family, base.prediction_type, base.guidance_rescale) == ("demo", "epsilon", 0.0)
    config = tmp_path / "unet" / "config.json"
    for width, family in ((1024, "sd21"), (768, "sd1")):
        config.write_text(json.dumps({**json.loads(config.read_text()), "cross_attention_dim": width}))
        assert get_base(tmp_path).family == family


def test_encode_orders_rows_as_diffusers(demo: Base, pipe: Any) -> None:
    rows = demo.encode(pipe, ["a robot", "a bunny"], negatives=["blurry", "blurry"])
    assert rows.prompt_embeds.shape == (4, 32, 32) and rows.added is None
    plain = demo.encode(pipe, ["a robot", "a bunny"])
    torch.testing.assert_close(rows.rows(slice(2, 4)).prompt_embeds, plain.prompt_embeds)
    torch.testing.assert_close(rows.rows([0]).prompt_embeds, demo.encode(pipe, ["blurry"]).prompt_embeds)
    assert demo.unet_kwargs(plain).keys() == {"encoder_hidden_states"}


def test_encode_adds_what_sdxl_wants(sdxl_folder: Path) -> None:
    base = get_base(sdxl_folder)
    pipe = base.load()
    rows = base.encode(pipe, ["a robot"], negatives=[""], size=(128, 64))
    assert rows.added is not None and rows.prompt_embeds.shape == (2, 32, 64)
    assert rows.added["time_ids"].tolist() == [[128, 64, 0, 0, 128, 64]] * 2
    assert float(rows.prompt_embeds[0].abs().max()) == 0, "an absent negative prompt is all zeros in SDXL"
    said = base.encode(pipe, ["a robot"], negatives=["blurry"])
    assert float(said.prompt_embeds[0].abs().max()) > 0
    latents = torch.randn(2, 8, 8, 8)
    assert pipe.unet(latents, 5, **base.unet_kwargs(rows)).sample.shape == latents.shape


def test_x0_and_target_go_through_the_base(demo: Base, pipe: Any) -> None:
    scheduler = pipe.scheduler
    x0, noise, t = torch.randn(2, 8, 8, 8), torch.randn(2, 8, 8, 8), torch.tensor([300, 999])
    noisy = scheduler.add_noise(x0, noise, t)
    torch.testing.assert_close(demo.x0_from(scheduler, demo.denoise_target(scheduler, x0, noise, t), noisy, t), x0)


def test_pictures_and_latents_have_matching_sizes(demo: Base, pipe: Any) -> None:
    latents = demo.to_latents(pipe, torch.rand(2, 3, 64, 64))
    assert latents.shape == (2, *demo.latent_shape())
    pictures = demo.decode(pipe, latents)
    assert pictures.shape == (2, 3, 64, 64) and float(pictures.min()) >= 0 and float(pictures.max()) <= 1
    assert demo.latent_shape(32, 96) == (8, 4, 12)


@pytest.mark.parametrize("size", [(60, 64), (-8, 64), (64, 4)])
def test_sizes_that_do_not_divide_are_refused(demo: Base, size: tuple[int, int]) -> None:
    with pytest.raises(InvalidRequest, match="multiples of 8"):
        demo.latent_shape(*size)


def test_the_cut_end_of_a_prompt_is_told(demo: Base, pipe: Any) -> None:
    assert demo.cut_off(pipe, "a robot and a bunny") == ""
    assert demo.cut_off(pipe, "cat " * 30 + "dog house") == "dog house"


def test_unknown_bases_are_refused_with_the_list(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InvalidRequest, match=r"sd21-base.*'flux'"):
        get_base("flux")
    with pytest.raises(InvalidRequest, match=r"model_index\.json"):
        get_base(tmp_path)
    monkeypatch.setenv("MOLE_ASSETS", str(tmp_path))
    with pytest.raises(InvalidRequest, match="demo base is missing"):
        get_base("demo")


def test_a_damaged_configuration_is_refused(assets_folder: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(assets_folder / "demo" / "base", tmp_path / "base")
    (folder / "unet" / "config.json").write_text("{")
    with pytest.raises(InvalidFile, match="not JSON"):
        get_base(folder)
    (folder / "unet" / "config.json").write_text("{}")
    with pytest.raises(InvalidFile, match="not those of Stable Diffusion"):
        get_base(folder)


def test_weights_that_are_not_safetensors_are_never_read(assets_folder: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(assets_folder / "demo" / "base", tmp_path / "base")
    weights = folder / "unet" / "diffusion_pytorch_model.safetensors"
    weights.rename(weights.with_suffix(".bin"))
    with pytest.raises(InvalidRequest, match="cannot be loaded"):
        get_base(folder).load()


def test_noise_prediction_with_zero_terminal_snr_is_a_contradiction(tmp_path: Path) -> None:
    tiny_sd("epsilon", zero_snr=True).save_pretrained(tmp_path)
    with pytest.raises(InvalidRequest, match="contradict"):
        get_base(tmp_path).load()


def test_an_unreachable_hub_ends_in_one_sentence() -> None:
    with pytest.raises(InvalidRequest, match=r"neither on this machine nor on the model hub.*give its path"):
        get_base("sd21", revision="absent").load()


def test_every_listed_base_but_the_demo_needs_no_files() -> None:
    for name in set(BASES) - {"demo"}:
        assert get_base(name).title == BASES[name] and not get_base(name).is_local


@pytest.mark.skipif(not (Path(__file__).parents[2] / "assets/demo/base").is_dir(), reason="the demo base is not here")
def test_the_shipped_demo_base_loads_and_answers() -> None:
    base = get_base("demo")
    pipe = base.load()
    assert base.prediction_type == "v_prediction" and base.resolution == 64
    assert base.encode(pipe, ["a cat"]).prompt_embeds.shape[0] == 1
