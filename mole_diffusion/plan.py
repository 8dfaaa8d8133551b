"""Where experts meet a pipeline: which module belongs to which gated block, and what it sees."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from torch import nn

from mole_diffusion.errors import BaseMismatch, InvalidRequest
from mole_diffusion.experts.canonical import COMPONENTS, Expert, LowRank
from mole_diffusion.experts.inspect import find_misfit
from mole_diffusion.experts.names import align
from mole_diffusion.gates.protocol import NETWORK, BlockSpec
from mole_diffusion.layers import ComposedConv2d, ComposedLinear

Sees = Literal["image", "text", "row"]


@dataclass(frozen=True)
class Site:
    """One module that experts touch.

    Attributes:
        key: "<component>.<path>" as this pipeline spells it.
        block: the block whose gate weighs it.
        sees: image tokens or grid cells, text tokens, or one vector per row of the batch.
    """

    key: str
    block: BlockSpec
    sees: Sees


@dataclass(frozen=True)
class Plan:
    """Everything about a set of experts on a pipeline that no gate decides.

    Columns are positions in the weights: the N gated experts in their order, then the always-on ones.

    Attributes:
        experts: all experts, in the caller's order.
        gated: the gated experts.
        always: experts with the role accelerator.
        sites: canonical key → site.
        pairs: canonical key → column → low-rank pair in the module's shape.
        blocks: blocks that hold sites, in the pipeline's order.
    """

    experts: tuple[Expert, ...]
    gated: tuple[Expert, ...]
    always: tuple[Expert, ...]
    sites: Mapping[str, Site]
    pairs: Mapping[str, Mapping[int, LowRank]]
    blocks: tuple[BlockSpec, ...]

    @property
    def columns(self) -> tuple[Expert, ...]:
        """Experts by column."""
        return self.gated + self.always


def build_plan(pipe: Any, experts: Sequence[Expert]) -> Plan:
    """Match experts with a pipeline.

    Raises:
        InvalidRequest: no gated expert, two experts of one name, or other adapters are still loaded.
        BaseMismatch: a module is missing or has another shape.
    """
    _check_experts(experts)
    modules = dict(_targets(pipe))
    shapes = {key: tuple(module.weight.shape) for key, module in modules.items()}
    for expert in experts:
        misfit = find_misfit(expert, shapes)
        if misfit:
            hint = f" It was made for {expert.base}." if expert.base else ""
            raise BaseMismatch(f"The LoRA {expert.name!r} does not fit this pipeline: {misfit}.{hint}")
    gated = tuple(expert for expert in experts if expert.role != "accelerator")
    always = tuple(expert for expert in experts if expert.role == "accelerator")
    pairs: dict[str, dict[int, LowRank]] = {}
    for column, expert in enumerate(gated + always):
        for key, pair in expert.modules.items():
            name = align(key, shapes)
            shaped = pair.reshaped(shapes[name]) if name else None
            assert name is not None and shaped is not None
            pairs.setdefault(name, {})[column] = shaped
    ordered = {key: pairs[key] for key in shapes if key in pairs}
    blocks = _blocks(pipe, ordered)
    sites = {key: _site(key, blocks) for key in ordered}
    used = {site.block.name for site in sites.values()}
    return Plan(tuple(experts), gated, always, sites, ordered, tuple(_narrow(blocks, sites, used)))


def find_module(pipe: Any, key: str) -> tuple[nn.Module, str, nn.Module]:
    """(parent, attribute, module) of a canonical key."""
    component, _, path = key.partition(".")
    parent_path, _, attribute = path.rpartition(".")
    parent = getattr(pipe, component).get_submodule(parent_path)
    return parent, attribute, parent.get_submodule(attribute)


def _check_experts(experts: Sequence[Expert]) -> None:
    if not any(expert.role != "accelerator" for expert in experts):
        raise InvalidRequest("A composition needs at least one expert that is not an accelerator.")
    names = [expert.name for expert in experts]
    double = next((name for name in names if names.count(name) > 1), None)
    if double is not None:
        raise InvalidRequest(f"Two experts are named {double!r}: give each its own name.")


def _targets(pipe: Any) -> Iterator[tuple[str, nn.Linear | nn.Conv2d]]:
    for component in COMPONENTS:
        model = getattr(pipe, component, None)
        if not isinstance(model, nn.Module):
            continue
        for path, module in model.named_modules():
            if hasattr(module, "base_layer"):
                raise InvalidRequest(
                    f"{component} still has adapters loaded (at {path}): call pipe.unload_lora_weights() first."
                )
            if isinstance(module, ComposedLinear | ComposedConv2d):
                raise InvalidRequest("Another composition is attached to this pipeline: detach it first.")
            if isinstance(module, nn.Linear | nn.Conv2d):
                yield f"{component}.{path}", module


def _blocks(pipe: Any, keys: Mapping[str, Any]) -> list[BlockSpec]:
    from diffusers.models.attention import BasicTransformerBlock
    from diffusers.models.resnet import ResnetBlock2D

    specs = []
    for path, module in pipe.unet.named_modules():
        if isinstance(module, BasicTransformerBlock):
            cross = _text_projections(module)
            width = cross[0].in_features if cross else 0
            specs.append(BlockSpec(path, "transformer", module.attn1.to_q.in_features, width))
        elif isinstance(module, ResnetBlock2D):
            specs.append(BlockSpec(path, "resnet", module.in_channels))
    specs.append(BlockSpec(NETWORK, "network", _text_width(pipe.unet)))
    specs.extend(BlockSpec(component, "encoder", 0) for component in COMPONENTS[1:] if hasattr(pipe, component))
    return specs


def _text_projections(block: Any) -> list[Any]:
    return [] if block.attn2 is None else [block.attn2.to_k, block.attn2.to_v]


def _text_width(unet: Any) -> int:
    width = unet.config.cross_attention_dim
    return width[0] if isinstance(width, list | tuple) else int(width)


def _site(key: str, blocks: Sequence[BlockSpec]) -> Site:
    component, _, path = key.partition(".")
    if component != "unet":
        return Site(key, next(block for block in blocks if block.name == component), "text")
    for block in blocks:
        if block.kind in ("transformer", "resnet") and path.startswith(f"{block.name}."):
            return Site(key, block, _sees(path.removeprefix(f"{block.name}."), block))
    return Site(key, next(block for block in blocks if block.kind == "network"), "row")


def _sees(leaf: str, block: BlockSpec) -> Sees:
    if leaf.startswith("time_emb_proj"):
        return "row"
    return "text" if block.text_width and leaf in ("attn2.to_k", "attn2.to_v") else "image"


def _narrow(blocks: Sequence[BlockSpec], sites: Mapping[str, Site], used: set[str]) -> Iterator[BlockSpec]:
    """Blocks in use, each knowing whether its image or its text side has targets."""
    for block in blocks:
        if block.name in used:
            seen = {site.sees for site in sites.values() if site.block.name == block.name}
            text_width = block.text_width if "text" in seen else 0
            image = bool(seen - {"text"}) or block.kind in ("network", "encoder")
            yield BlockSpec(block.name, block.kind, block.width, text_width, image)
