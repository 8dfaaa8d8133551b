"""Module names: from the flattened names of kohya files, and from the original SDXL names, to diffusers' own.

``lora_unet_down_blocks_1_attentions_0_…`` has lost the difference between "." and "_". It is resolved against the real
module names of a base where they are known, and otherwise by the grammar of UNet2DConditionModel and CLIPTextModel.
"""

from __future__ import annotations

import re
from collections.abc import Container, Mapping

ModuleShapes = Mapping[str, tuple[int, ...]]

_TEXT_PREFIX = "text_model."
_LEAF = (
    r"(?:resnets|motion)_\d+_(?:conv1|conv2|time_emb_proj|conv_shortcut)"
    r"|(?:downsamplers|upsamplers)_\d+_conv"
    r"|attentions_\d+_(?:proj_in|proj_out)"
    r"|attentions_\d+_transformer_blocks_\d+_(?:attn[12]_(?:to_[qkv]|to_out_0)|ff_net_0_proj|ff_net_2)"
)
_UNET = re.compile(
    rf"(?:(?:down|up)_blocks_\d+|mid_block)_(?:{_LEAF})|conv_in|conv_out|(?:time|add)_embedding_linear_[12]"
)
_TEXT = re.compile(r"(?:text_model_)?encoder_layers_\d+_(?:self_attn_(?:[qkv]|out)_proj|mlp_fc[12])|text_projection")
# Parts of a name whose underscores are their own: longer ones first.
_WORDS = re.compile(
    r"transformer_blocks|down_blocks|up_blocks|mid_block|text_model|text_projection|self_attn|"
    r"time_embedding|add_embedding|time_emb_proj|conv_shortcut|proj_in|proj_out|conv_in|conv_out|"
    r"linear_[12]|to_out|to_[qkv]|[qkv]_proj|out_proj|mlp|fc[12]|[a-z]+\d*|\d+"
)
# Original ("sgm", LDM) name → diffusers name inside one ResNet; origin: diffusers convert_ldm_unet_checkpoint.
SGM_RESNET = {
    "in_layers_2": "conv1",
    "out_layers_3": "conv2",
    "emb_layers_1": "time_emb_proj",
    "skip_connection": "conv_shortcut",
}
SGM_TOP = {
    "input_blocks_0_0": "conv_in",
    "out_2": "conv_out",
    "time_embed_0": "time_embedding_linear_1",
    "time_embed_2": "time_embedding_linear_2",
    "label_emb_0_0": "add_embedding_linear_1",
    "label_emb_0_2": "add_embedding_linear_2",
}
_SGM_PLACE = re.compile(r"(input_blocks|output_blocks)_(\d+)_(\d+)_(.+)")
_SGM_MIDDLE = re.compile(r"middle_block_(\d+)_(.+)")


class Resolver:
    """Turns flattened names into canonical keys.

    Args:
        shapes: ``base.module_shapes()``; without it the grammar decides, and original SDXL names are taken to come
            from a UNet with two layers per block, as every published SD and SDXL has.
    """

    def __init__(self, shapes: ModuleShapes | None = None) -> None:
        self.shapes = shapes
        self.flat = {_flatten(key): key for key in shapes or ()}
        self.layers = _layers_per_block(shapes) if shapes else 2

    def key(self, component: str, flat: str) -> str | None:
        """Canonical key of a flattened module name, None where nothing has that name."""
        name = flat
        if component == "unet" and not self._known(component, flat):
            name = sgm_to_diffusers(flat, self.layers) or flat
        if self.shapes is None:
            return canonical_key(component, _unflatten(name)) if self._known(component, name) else None
        for candidate in (name, name.removeprefix("text_model_"), f"text_model_{name}"):
            found = self.flat.get(f"{component}_{candidate}")
            if found:
                return found
        return None

    def dotted(self, component: str, path: str) -> str:
        """Canonical key of a name that still has its dots, spelled as the base spells it where that is known."""
        key = canonical_key(component, path)
        return (align(key, self.shapes) or key) if self.shapes else key

    def _known(self, component: str, flat: str) -> bool:
        if self.shapes is not None:
            return f"{component}_{flat}" in self.flat
        return bool((_UNET if component == "unet" else _TEXT).fullmatch(flat))


def sgm_to_diffusers(flat: str, layers: int) -> str | None:
    """Flattened original name → flattened diffusers name, for any UNet with ``layers`` ResNets per down block.

    input_blocks.i counts ResNets and downsamplers from 1 (layers + 1 per block), output_blocks.i counts ResNets from 0
    (layers + 1 per block); the second index is 0 = ResNet, then attention, then sampler.
    """
    if flat in SGM_TOP:
        return SGM_TOP[flat]
    if match := _SGM_MIDDLE.fullmatch(flat):
        place = {"0": "resnets_0", "1": "attentions_0", "2": "resnets_1"}.get(match[1])
        return place and f"mid_block_{place}_{SGM_RESNET.get(match[2], match[2])}"
    if not (match := _SGM_PLACE.fullmatch(flat)):
        return None
    side, index, inner, rest = match[1], int(match[2]), int(match[3]), match[4]
    block, layer = divmod(index - (side == "input_blocks"), layers + 1)
    prefix = f"{'down' if side == 'input_blocks' else 'up'}_blocks_{block}"
    if rest == "op":
        return f"{prefix}_downsamplers_0_conv"
    if rest == "conv":
        return f"{prefix}_upsamplers_0_conv"
    if inner == 0:
        return f"{prefix}_resnets_{layer}_{SGM_RESNET.get(rest, rest)}"
    return f"{prefix}_attentions_{layer}_{rest}"


def canonical_key(component: str, path: str) -> str:
    """ "<component>.<path>", text towers spelled as transformers 5 does.

    CLIPTextModel (text_encoder) has lost its ``text_model.`` level, CLIPTextModelWithProjection (text_encoder_2) has
    kept it. Files carry either spelling; :func:`align` serves other versions.
    """
    bare = path.removeprefix(_TEXT_PREFIX)
    if component == "text_encoder_2" and bare != "text_projection":
        return f"{component}.{_TEXT_PREFIX}{bare}"
    return f"{component}.{bare if component.startswith('text_encoder') else path}"


def align(key: str, available: Container[str]) -> str | None:
    """``key`` as ``available`` spells it (with or without ``text_model.``), None where it is absent."""
    if key in available:
        return key
    component, _, path = key.partition(".")
    if not component.startswith("text_encoder"):
        return None
    other = path.removeprefix(_TEXT_PREFIX) if path.startswith(_TEXT_PREFIX) else f"{_TEXT_PREFIX}{path}"
    return f"{component}.{other}" if f"{component}.{other}" in available else None


def _flatten(key: str) -> str:
    return key.replace(".", "_")


def _unflatten(flat: str) -> str:
    return ".".join(_WORDS.findall(flat))


def _layers_per_block(shapes: ModuleShapes) -> int:
    numbers = [int(match[1]) for key in shapes if (match := re.match(r"unet\.down_blocks\.\d+\.resnets\.(\d+)\.", key))]
    return max(numbers, default=1) + 1
