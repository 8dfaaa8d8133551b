"""diffusers and PEFT files: module names with their dots.

| key | origin |
|---|---|
| unet.<path>.lora_A.weight / lora_B.weight | PEFT backend, diffusers ≥ 0.20 |
| unet.<path>.lora.down.weight / lora.up.weight | the same, as save_lora_weights wrote it |
| unet.….attn1.processor.to_q_lora.down.weight | attention processors, diffusers < 0.20, with or without "unet." |
| text_encoder.….q_proj.lora_linear_layer.down.weight, ….self_attn.to_q_lora.down.weight | text towers of then |
| base_model.model.<path>.lora_A.weight | PEFT save_pretrained; of a language model where <path> is no UNet's |
| <path>.lora_magnitude_vector, ….lora_magnitude_vector.weight | DoRA, beside lora_A and lora_B |

These files have no alpha of their own; α, r and their patterns come from the ``lora_adapter_metadata`` of the header.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import Tensor

from mole_diffusion.errors import InvalidFile
from mole_diffusion.experts.canonical import COMPONENTS, LowRank
from mole_diffusion.experts.formats import Converted
from mole_diffusion.experts.formats.adapter_config import AdapterConfigs
from mole_diffusion.experts.formats.pairs import Parts, build_pair, unmatched_keys, with_magnitude
from mole_diffusion.experts.names import Resolver
from mole_diffusion.experts.safefile import Header

NAME = "diffusers"
_PEFT_PREFIX = "base_model.model."
_KEY = re.compile(
    r"(?P<path>.+?)(?:"
    r"\.(?P<new>lora_A|lora_B)(?:\.[A-Za-z0-9_-]+)?\.weight"
    r"|\.lora(?:_linear_layer)?\.(?P<mid>down|up)\.weight"
    r"|(?:\.processor)?\.to_(?P<proj>q|k|v|out)_lora\.(?P<old>down|up)\.weight"
    r"|\.(?P<dora>lora_magnitude_vector)(?:\.[A-Za-z0-9_-]+)?(?:\.weight)?"
    r"|\.alpha)"
)
_PART = {"lora_A": "down", "lora_B": "up", "down": "down", "up": "up", "lora_magnitude_vector": "magnitude"}
_UNET_TOP = ("down_blocks.", "up_blocks.", "mid_block.", "conv_in", "conv_out", "time_embedding.", "add_embedding.")
_TEXT_TOP = ("text_model.", "encoder.layers.")
_LANGUAGE_TOP = ("h.", "layers.", "blocks.")


def matches(header: Header) -> bool:
    """Any low-rank weight under a dotted module name."""
    return any(_KEY.fullmatch(key) and not key.endswith(".alpha") for key in header.tensors)


def convert(tensors: Mapping[str, Tensor], header: Header, resolver: Resolver | None = None) -> Converted:
    """Tensors by name → canonical modules; scale from the adapter metadata where there is one, else 1."""
    resolver = resolver or Resolver()
    configs = AdapterConfigs.read(header.metadata)
    grouped: dict[str, Parts] = {}
    for key, tensor in tensors.items():
        place = _place(key)
        if place:
            component, path, part = place
            grouped.setdefault(resolver.dotted(component, path), Parts()).add(part, key, tensor)
    if not configs and any(key.startswith(_PEFT_PREFIX) for key in tensors):
        raise InvalidFile(
            "This file was written by PEFT's save_pretrained; its scale is in the adapter_config.json beside it, which "
            "is missing here: export the LoRA with save_lora_weights, or in kohya's format."
        )
    modules: dict[str, LowRank] = {}
    alphas: dict[str, float] = {}
    placed: set[str] = set()
    for module, parts in grouped.items():
        down = parts.tensors.get("down")
        stated = configs.alpha_and_scale(module, down.shape[0]) if down is not None and down.shape[0] else None
        built = build_pair(module, parts, default_scale=stated[1] if stated else None)
        if built is None:
            continue
        modules[module] = with_magnitude(module, parts, built).pair
        configs.check_magnitude(module, modules[module].magnitude)
        alpha = built.alpha if built.alpha is not None else stated and stated[0]
        if alpha is not None:
            alphas[module] = alpha
        placed.update(parts.keys.values())
    return Converted(modules, unmatched_keys(tensors, placed), alphas)


def _place(key: str) -> tuple[str, str, str] | None:
    """(component, module path, part) of a key."""
    match = _KEY.fullmatch(key)
    if not match:
        return None
    whole = match["path"]
    component, path = _component(whole.removeprefix(_PEFT_PREFIX), peft=whole.startswith(_PEFT_PREFIX))
    if component is None:
        return None
    if match["proj"]:
        path = f"{path}.{_old_projection(component, match['proj'])}"
    path = path.removesuffix(".processor").replace(".processor.", ".")
    found = match["new"] or match["mid"] or match["old"] or match["dora"]
    return component, path, _PART[found] if found else "alpha"


def _component(path: str, *, peft: bool) -> tuple[str | None, str]:
    """In PEFT's own files "model." and "transformer." are where language models keep their layers."""
    first, _, rest = path.partition(".")
    if first in COMPONENTS and not (peft and (first == "model" or rest.startswith(_LANGUAGE_TOP))):
        return first, rest
    if path.startswith(_UNET_TOP):
        return "unet", path
    if path.startswith(_TEXT_TOP):
        return "text_encoder", path
    return ("model" if peft else None), path


def _old_projection(component: str, projection: str) -> str:
    if component == "unet":
        return "to_out.0" if projection == "out" else f"to_{projection}"
    return f"{projection}_proj"
