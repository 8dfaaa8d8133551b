"""kohya-ss files (and everything that writes like them): one flattened module name, then down, up and alpha, or the
parts of LyCORIS's products (lycoris.py); with either a ``dora_scale``.

| key | module | origin |
|---|---|---|
| lora_unet_down_blocks_1_attentions_0_…_attn1_to_q.lora_down.weight | unet | sd-scripts networks/lora.py, SD 1/2 |
| lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q.… | unet, original SDXL names | the same, SDXL |
| lora_te_text_model_encoder_layers_0_mlp_fc1.… | text_encoder | SD 1/2 |
| lora_te1_… / lora_te2_… | text_encoder / text_encoder_2 | SDXL |
| lora_te2_text_projection.… | text_encoder_2.text_projection | OneTrainer |
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import Tensor

from mole_diffusion.experts.canonical import LowRank
from mole_diffusion.experts.formats import Converted
from mole_diffusion.experts.formats.lycoris import Budget, build_lycoris
from mole_diffusion.experts.formats.pairs import Parts, build_pair, unmatched_keys, with_magnitude
from mole_diffusion.experts.names import Resolver
from mole_diffusion.experts.safefile import Header

NAME = "kohya"
PREFIXES = {
    "lora_unet_": "unet",
    "lora_te_": "text_encoder",
    "lora_te1_": "text_encoder",
    "lora_te2_": "text_encoder_2",
}
_KEY = re.compile(
    r"(lora_unet_|lora_te[12]?_)([A-Za-z0-9_]+)\.(lora_(?:down|up|mid)\.weight|alpha|dora_scale|diff"
    r"|hada_w[12]_[ab]|hada_t[12]|lokr_w[12](?:_[ab])?|lokr_t2)"
)
_PARTS = {"lora_down.weight": "down", "lora_up.weight": "up", "lora_mid.weight": "mid"}
_PLAIN = {"down", "up", "alpha", "dora_scale"}


def matches(header: Header) -> bool:
    """Any key in kohya's prefixes."""
    return any(key.startswith(tuple(PREFIXES)) for key in header.tensors)


def convert(tensors: Mapping[str, Tensor], header: Header, resolver: Resolver | None = None) -> Converted:
    """Tensors by name → canonical modules; scale = alpha / dim per module."""
    resolver = resolver or Resolver()
    grouped: dict[str, Parts] = {}
    for key, tensor in tensors.items():
        match = _KEY.fullmatch(key)
        module = resolver.key(PREFIXES[match[1]], match[2]) if match else None
        if match and module:
            grouped.setdefault(module, Parts()).add(_PARTS.get(match[3], match[3]), key, tensor)
    modules: dict[str, LowRank] = {}
    alphas: dict[str, float] = {}
    errors: dict[str, float] = {}
    budget = Budget()
    placed: set[str] = set()
    for module, parts in grouped.items():
        plain = parts.keys.keys() <= _PLAIN
        built = build_pair(module, parts) if plain else build_lycoris(module, parts, budget)
        if built is None:
            continue
        modules[module] = with_magnitude(module, parts, built).pair
        if built.alpha is not None:
            alphas[module] = built.alpha
        if built.error:
            errors[module] = built.error
        placed.update(parts.keys.values())
    return Converted(modules, unmatched_keys(tensors, placed), alphas, errors)
