"""What a base's configuration files say, read without its weights: sizes, and the shape of every weight."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mole_diffusion.errors import InvalidFile, InvalidRequest

if TYPE_CHECKING:
    from torch import nn

Config = dict[str, Any]
SHIPPED = Path(__file__).parent / "configs"
_FILES = {
    "unet": "config.json",
    "text_encoder": "config.json",
    "text_encoder_2": "config.json",
    "vae": "config.json",
    "scheduler": "scheduler_config.json",
}
_OPTIONAL = {"text_encoder_2"}
# Config fields of SD 2.1 and SDXL that say nothing about shapes but end in a warning when they are passed on.
_NOT_ARGUMENTS = ("_class_name", "_diffusers_version", "_name_or_path", "architectures", "torch_dtype", "dtype")


def read_configs(source: Path) -> dict[str, Config]:
    """The configurations of a pipeline's components, by component name.

    Args:
        source: a pipeline folder (``model_index.json`` beside one folder per component), or one of the JSON files in
            ``bases/configs`` that hold the same configurations together.

    Raises:
        InvalidRequest: the folder is not a pipeline folder.
        InvalidFile: a configuration is missing or is not JSON.
    """
    if source.suffix == ".json":
        return _read_json(source)
    if not (source / "model_index.json").is_file():
        raise InvalidRequest(
            f"Expected a diffusers pipeline folder with a model_index.json, found none in {source}: "
            "pass the folder that holds unet, vae, text_encoder, tokenizer and scheduler."
        )
    paths = {name: source / name / file for name, file in _FILES.items()}
    return {name: _read_json(path) for name, path in paths.items() if name not in _OPTIONAL or path.is_file()}


def _read_json(path: Path) -> Config:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InvalidFile(f"The base needs {path.name} in {path.parent}, which cannot be read: {error}.") from error
    except ValueError as error:
        raise InvalidFile(f"{path} is not JSON ({error}): fetch the base again.") from error
    if not isinstance(content, dict):
        raise InvalidFile(f"{path} holds a {type(content).__name__} where a configuration was expected.")
    return content


def vae_scale_factor(configs: Mapping[str, Config]) -> int:
    """Pixels per latent place along one side."""
    return 2 ** (len(configs["vae"]["block_out_channels"]) - 1)


def build_on_meta(component: str, config: Config) -> nn.Module:
    """One component as its real class, every weight on the meta device: takes no memory and reads no file."""
    import torch

    with torch.device("meta"):
        return _text_tower(config) if component.startswith("text_encoder") else _unet(config)


def _unet(config: Config) -> nn.Module:
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(**{key: value for key, value in config.items() if key not in _NOT_ARGUMENTS})


def _text_tower(config: Config) -> nn.Module:
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    projected = "CLIPTextModelWithProjection" in (config.get("architectures") or [])
    arguments = {key: value for key, value in config.items() if key not in _NOT_ARGUMENTS}
    return (CLIPTextModelWithProjection if projected else CLIPTextModel)(CLIPTextConfig(**arguments))


@lru_cache(maxsize=8)
def _shapes(fingerprint: str, components: tuple[str, ...]) -> dict[str, tuple[int, ...]]:
    from torch import nn

    configs, shapes = json.loads(fingerprint), {}
    for component in components:
        for path, module in build_on_meta(component, configs[component]).named_modules():
            if isinstance(module, nn.Linear | nn.Conv2d):
                shapes[f"{component}.{path}"] = tuple(module.weight.shape)
    return shapes


def weight_shapes(configs: Mapping[str, Config], components: tuple[str, ...]) -> dict[str, tuple[int, ...]]:
    """Weight shape of every linear and convolution layer, keyed ``"<component>.<module path>"``."""
    wanted = {name: configs[name] for name in components}
    return dict(_shapes(json.dumps(wanted, sort_keys=True), components))


@lru_cache(maxsize=8)
def _blocks(fingerprint: str) -> tuple[str, ...]:
    names = {"BasicTransformerBlock", "ResnetBlock2D"}
    unet = build_on_meta("unet", json.loads(fingerprint))
    return tuple(path for path, module in unet.named_modules() if type(module).__name__ in names)


def block_paths(configs: Mapping[str, Config]) -> tuple[str, ...]:
    """Paths of the UNet's blocks (BasicTransformerBlock, ResnetBlock2D): the places of a block gate."""
    return _blocks(json.dumps(configs["unet"], sort_keys=True))
