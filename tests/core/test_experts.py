"""Experts: what files say about themselves, saving, inspecting, fitting."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save

from mole_diffusion.__main__ import main
from mole_diffusion.errors import BaseMismatch, InvalidRequest
from mole_diffusion.experts import Expert, LowRank, check_fits, inspect_file, read_header, save_expert
from mole_diffusion.experts.save import write_safetensors
from tests.core.small import CONV_TARGETS, SD_TARGETS, TEXT_TARGETS, make_expert, make_sdxl, shapes_of

WIDTH_KEY = "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn2_to_k"


class Base:
    """What inspection asks of a base."""

    title, family = "Tiny", "demo"

    def __init__(self, pipe: Any) -> None:
        self.shapes = shapes_of(pipe)

    def module_shapes(self) -> dict[str, tuple[int, ...]]:
        return self.shapes


def file(width: int = 1024, prefix: str = WIDTH_KEY, **metadata: str) -> bytes:
    tensors = {f"{prefix}.lora_down.weight": torch.randn(2, width), f"{prefix}.lora_up.weight": torch.randn(8, 2)}
    return save(tensors, metadata or None)


@pytest.mark.parametrize(
    ("metadata", "trigger"),
    [
        ({"modelspec.trigger_phrase": "  sks   dog\n", "ss_dataset_dirs": "{}"}, "sks dog"),
        ({"ss_tag_frequency": json.dumps({"10_x": {"sks dog": 9, "grass": 3}, "2_y": {"grass": 4}})}, "sks dog"),
        ({"ss_dataset_dirs": json.dumps({"10_sks dog": {"n_repeats": 10}})}, "sks dog"),
        ({"ss_tag_frequency": "{", "ss_dataset_dirs": "[]"}, None),
        ({"ss_tag_frequency": "[" * 90_000, "ss_dataset_dirs": '{"img": 1}'}, None),
        ({"ss_tag_frequency": '{"a": {"b": "x"}, "c": 1}'}, None),
        ({"ss_tag_frequency": '{"a": {"b": 1.5, "b ": 1' + "0" * 400 + "}}"}, "b"),
    ],
)
def test_trigger_words(metadata: dict[str, str], trigger: str | None) -> None:
    assert Expert.load(file(**metadata)).trigger == trigger
    assert Expert.load(file(**metadata), trigger="mine").trigger == "mine"


def test_the_sidecar_of_a_model_manager_names_the_trigger(tmp_path: Path) -> None:
    path, sidecar = tmp_path / "dog.safetensors", tmp_path / "dog.json"
    path.write_bytes(file(ss_dataset_dirs=json.dumps({"10_folder": {}})))
    before = Expert.load(path)
    assert before.trigger == "folder"
    sidecar.write_text(json.dumps({"activation text": "  sks\tdog ", "preferred weight": 1}))
    assert Expert.load(path).trigger == "sks dog" == inspect_file(path, header_only=True).trigger
    assert Expert.load(path).sha256 == before.sha256, "the user may change the words"
    for other in ("{", "[]", '{"activation text": 3}', "[" * 90_000, " " * (2**20 + 1) + "{}"):
        sidecar.write_text(other)
        assert Expert.load(path).trigger == "folder"
    sidecar.write_text(json.dumps({"activation text": "other"}))
    path.write_bytes(file(ss_tag_frequency=json.dumps({"x": {"sks dog": 9}})))
    assert Expert.load(path).trigger == "sks dog"


def test_inspect_of_the_command_line_by_the_header_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "dog.safetensors"
    path.write_bytes(file())
    (tmp_path / "tokens.safetensors").write_bytes(save({"clip_l": torch.ones(1, 8)}))
    words = ["inspect", str(path), "--header", "--embeddings", str(tmp_path / "tokens.safetensors"), "--json"]
    assert main(words) == 0
    seen = json.loads(capsys.readouterr().out)
    assert seen["header_only"] and seen["embeddings"] == {"<s0>": 1} and seen["base"] == "sd21" and seen["dora"] == 0


@pytest.mark.parametrize(
    ("metadata", "width", "base"),
    [
        ({}, 768, "sd1"),
        ({}, 1024, "sd21"),
        ({}, 2048, "sdxl"),
        ({}, 192, None),
        ({"mole.base": "demo"}, 192, "demo"),
        ({"ss_base_model_version": "sdxl_base_v1-0"}, 192, "sdxl"),
        ({"ss_base_model_version": "sd_v2_768_v"}, 192, "sd21"),
        ({"ss_base_model_version": "sd_v1"}, 192, "sd1"),
        ({"modelspec.architecture": "stable-diffusion-xl-v1-base/lora"}, 192, "sdxl"),
    ],
)
def test_base_family(metadata: dict[str, str], width: int, base: str | None) -> None:
    assert Expert.load(file(width, **metadata)).base == base


def test_names_hash_and_producer(tmp_path: Path) -> None:
    data = file(**{"ss_network_module": "networks.lora", "modelspec.title": "My dog"})
    path = tmp_path / "a dog.safetensors"
    path.write_bytes(data)
    assert Expert.load(path).name == "a dog" and Expert.load(data).name == "My dog"
    assert Expert.load(path, name="x").name == "x"
    assert Expert.load(path).sha256 == hashlib.sha256(data).hexdigest() == Expert.load(data).sha256
    assert Expert.load(path).producer == "kohya-ss"
    assert Expert.load(file(**{"ot_config": "{}"})).producer == "OneTrainer"


def test_experts_from_memory_have_a_content_hash() -> None:
    pair = LowRank(torch.ones(2, 3), torch.ones(4, 2), 0.5)
    one, two = Expert("a", {"unet.x": pair}), Expert("b", {"unet.x": pair})
    assert one.sha256 == two.sha256 != Expert("a", {"unet.y": pair}).sha256
    with pytest.raises(InvalidRequest, match="role"):
        Expert("a", {"unet.x": pair}, role="hero")  # type: ignore[arg-type]


def test_delta() -> None:
    pair = LowRank(torch.randn(2, 3, 3, 3), torch.randn(4, 2), 0.5)
    assert pair.delta().shape == pair.weight_shape == (4, 3, 3, 3)
    torch.testing.assert_close(pair.delta()[1, 2], 0.5 * torch.einsum("r,rij->ij", pair.b[1], pair.a[:, 2]))


@pytest.mark.parametrize("file_format", ["diffusers", "kohya"])
def test_saved_expert_comes_back(pipe: Any, file_format: Any, tmp_path: Path) -> None:
    targets = SD_TARGETS + CONV_TARGETS + TEXT_TARGETS
    expert = make_expert(pipe, "robot", targets=targets, scale=0.3, trigger="sks robot", base="demo", role="style")
    path = save_expert(expert, tmp_path / "deep" / "r.safetensors", format=file_format, metadata={"note": "hello"})
    again = Expert.load(path)
    assert set(again.modules) == set(expert.modules)
    assert (again.trigger, again.base, again.role) == ("sks robot", "demo", "style")
    assert again.metadata["note"] == "hello" and again.producer == "MoLE Diffusion"
    for key, pair in expert.modules.items():
        torch.testing.assert_close(again.modules[key].delta(), pair.delta())
    assert [found.name for found in path.parent.iterdir()] == ["r.safetensors"]


@pytest.mark.parametrize("file_format", ["diffusers", "kohya"])
def test_a_stated_scale_is_applied_once(sd: Any, file_format: Any, tmp_path: Path) -> None:
    expert = make_expert(sd, "robot", rank=4)
    stated = {"lora_adapter_metadata": json.dumps({"unet.r": 4, "unet.lora_alpha": 2, "r": 4, "lora_alpha": 2})}
    first = Expert.load(save_expert(expert, tmp_path / "first.safetensors", metadata=stated))
    second = Expert.load(save_expert(first, tmp_path / "second.safetensors", format=file_format))
    assert "lora_adapter_metadata" in first.metadata and "lora_adapter_metadata" not in second.metadata
    for key, pair in first.modules.items():
        torch.testing.assert_close(second.modules[key].delta(), pair.delta())


def test_saved_dtype_and_unknown_format(sd: Any, tmp_path: Path) -> None:
    expert = make_expert(sd, "robot")
    path = save_expert(expert, tmp_path / "r.safetensors", dtype=torch.float16)
    assert {dtype for dtype, _ in read_header(path).tensors.values()} == {"F16"}
    with pytest.raises(InvalidRequest, match="diffusers or kohya"):
        save_expert(expert, tmp_path / "r.safetensors", format="ckpt")  # type: ignore[arg-type]


def test_equal_content_has_equal_bytes(sd: Any, tmp_path: Path) -> None:
    words = {f"mole.word{number}": str(number) for number in range(12)}
    module = {"unet.conv_in": LowRank(torch.ones(2, 4, 3, 3), torch.ones(8, 2))}
    files = [save_expert(module, tmp_path / f"{n}.safetensors", metadata=words).read_bytes() for n in range(4)]
    assert len(set(files)) == 1 and read_header(tmp_path / "0.safetensors").metadata == {**words}


def test_a_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_safetensors({"a": torch.ones(1)}, tmp_path / "a.safetensors", {})
    before = path.read_bytes()

    def fail(*_: Any) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        write_safetensors({"a": torch.zeros(1)}, path, {})
    assert path.read_bytes() == before and len(list(tmp_path.iterdir())) == 1


def test_inspection_of_a_good_file(pipe: Any, tmp_path: Path) -> None:
    expert = make_expert(pipe, "robot", rank=3, targets=(*SD_TARGETS, "fc1"), trigger="sks robot", base="demo")
    path = save_expert(expert, tmp_path / "robot.safetensors", format="kohya")
    result = inspect_file(path, Base(pipe))
    assert result.ok and result.fits == "Tiny" and result.base == "demo" and result.trigger == "sks robot"
    assert result.ranks == {3: len(expert.modules)} and result.alphas == {"2.1": len(expert.modules)}
    assert result.matched == 3 * len(expert.modules) and result.unmatched == 0
    assert set(result.targets) == set(expert.components) and sum(result.targets.values()) == len(expert.modules)
    assert "rank 3" in result.sentence() and "sks robot" in result.sentence()
    assert json.loads(json.dumps(result.to_json()))["sha256"] == result.sha256


def test_inspection_of_a_file_that_is_understood_in_part() -> None:
    tensors = {f"{WIDTH_KEY}.lora_down.weight": torch.ones(2, 8), f"{WIDTH_KEY}.lora_up.weight": torch.ones(8, 2)}
    odd = {f"strange.{index}": torch.ones(1) for index in range(5)}
    result = inspect_file(save({**tensors, **odd}))
    assert not result.ok and (result.matched, result.unmatched) == (2, 5) and len(result.examples) == 3
    assert "5 of 7" in result.reason and "strange.0" in result.reason and "strange.4" not in result.reason


def test_a_lora_of_another_base_is_reported_as_such(sd: Any, tmp_path: Path) -> None:
    sdxl = make_sdxl()
    for file_format in ("diffusers", "kohya"):
        path = save_expert(make_expert(sdxl, "r", base="sdxl"), tmp_path / "r.safetensors", format=file_format)  # type: ignore[arg-type]
        result = inspect_file(path, Base(sd))
        assert not result.ok and "does not fit Tiny" in result.reason and "made for sdxl" in result.reason
        assert inspect_file(path, Base(sdxl)).ok


def test_check_fits(sd: Any) -> None:
    good = make_expert(sd, "robot")
    check_fits(good, Base(sd))
    key, pair = next(iter(good.modules.items()))
    with pytest.raises(BaseMismatch, match="do not exist"):
        check_fits(Expert("x", {"unet.nowhere": pair}), Base(sd))
    wrong = LowRank(pair.a[:, 1:], pair.b, 1.0)
    with pytest.raises(BaseMismatch, match="another shape"):
        check_fits(Expert("x", {key: wrong}), Base(sd))


def test_import_does_no_work() -> None:
    code = (
        "import sys, mole_diffusion; assert 'torch' not in sys.modules; "
        "from mole_diffusion import Expert; assert not {'diffusers', 'transformers', 'gradio'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[2])
