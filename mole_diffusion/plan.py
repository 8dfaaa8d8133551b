"""Where experts meet a model: which module belongs to which gated place, and what it reads."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from torch import nn

from mole_diffusion.errors import BaseMismatch, InvalidRequest
from mole_diffusion.experts.canonical import Expert, LowRank
from mole_diffusion.experts.inspect import find_misfit
from mole_diffusion.experts.names import align
from mole_diffusion.gates.config import Granularity
from mole_diffusion.gates.protocol import NETWORK, BlockSpec, Sees
from mole_diffusion.hosts import Host
from mole_diffusion.layers import ComposedConv2d, ComposedLinear

_IMAGE_OUTSIDE = {"proj_in", "proj_out", "conv_in", "conv_out", "downsamplers", "upsamplers"}


@dataclass(frozen=True)
class Site:
    """One module that experts touch.

    Attributes:
        key: "<component>.<path>" as this model spells it.
        block: the place whose gate weighs it.
        sees: image tokens or grid cells, text tokens, or one vector per row of the batch.
        shares: key of the input that it reads together with other modules; "" = nobody else reads it.
    """

    key: str
    block: BlockSpec
    sees: Sees
    shares: str = ""


@dataclass(frozen=True)
class Plan:
    """Everything about a set of experts on a model that no gate decides.

    Columns are positions in the weights: the N gated experts in their order, then the always-on ones.

    Attributes:
        experts: all experts, in the caller's order.
        gated: the gated experts.
        always: accelerators, and whoever was asked to stay outside the gate.
        sites: canonical key → site.
        pairs: canonical key → column → low-rank pair in the module's shape.
        blocks: places that hold sites, in the model's order.
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

    @property
    def sizes(self) -> dict[str, tuple[int, int]]:
        """Module path → (input channels, output channels) of every gated module."""
        sizes = {}
        for key, pairs in self.pairs.items():
            if self.sites[key].block.kind != "encoder":
                shape = next(iter(pairs.values())).weight_shape
                sizes[key.partition(".")[2]] = (shape[1], shape[0])
        return sizes


def build_plan(
    host: Host,
    experts: Sequence[Expert],
    granularity: Granularity = "block",
    outside: Sequence[str] = (),
    owner: object | None = None,
) -> Plan:
    """Match experts with a model.

    Args:
        host: where they go.
        experts: in the caller's order.
        granularity: how finely gates are placed.
        outside: names of experts that no gate weighs; accelerators never are.
        owner: context of a composition whose layers may be there already.

    Raises:
        InvalidRequest: no gated expert, two experts of one name, or other adapters are still loaded.
        BaseMismatch: a module is missing or has another shape.
    """
    gated, always = _split(experts, outside)
    modules = dict(_targets(host, owner))
    shapes = {key: tuple(module.weight.shape) for key, module in modules.items()}
    for expert in experts:
        misfit = find_misfit(expert, shapes)
        if misfit:
            hint = f" It was made for {expert.base}." if expert.base else ""
            raise BaseMismatch(f"The LoRA {expert.name!r} does not fit this pipeline: {misfit}.{hint}")
    pairs: dict[str, dict[int, LowRank]] = {}
    for column, expert in enumerate(gated + always):
        for key, pair in expert.modules.items():
            name = align(key, shapes)
            shaped = pair.reshaped(shapes[name]) if name else None
            assert name is not None and shaped is not None
            _check_groups(name, modules[name])
            pairs.setdefault(name, {})[column] = shaped
    ordered = {key: pairs[key] for key in shapes if key in pairs}
    sites = _sites(host, {key: modules[key] for key in ordered}, granularity)
    used = tuple(_used(host, sites, modules, granularity))
    return Plan(tuple(experts), gated, always, sites, ordered, used)


def find_module(host: Host, key: str) -> tuple[nn.Module, str, nn.Module]:
    """(parent, attribute, module) of a canonical key."""
    component, _, path = key.partition(".")
    parent_path, _, attribute = path.rpartition(".")
    parent = host.models()[component].get_submodule(parent_path)
    return parent, attribute, parent.get_submodule(attribute)


def _split(experts: Sequence[Expert], outside: Sequence[str]) -> tuple[tuple[Expert, ...], tuple[Expert, ...]]:
    names = [expert.name for expert in experts]
    double = next((name for name in names if names.count(name) > 1), None)
    if double is not None:
        raise InvalidRequest(f"Two experts are named {double!r}: give each its own name.")
    unknown = next((name for name in outside if name not in names), None)
    if unknown is not None:
        raise InvalidRequest(f"No expert is named {unknown!r}; there are {', '.join(names)}.")
    always = tuple(expert for expert in experts if expert.role == "accelerator" or expert.name in outside)
    gated = tuple(expert for expert in experts if expert not in always)
    if not gated:
        raise InvalidRequest("A composition needs at least one expert that is not an accelerator or outside the gate.")
    return gated, always


def _targets(host: Host, owner: object | None) -> Iterator[tuple[str, nn.Linear | nn.Conv2d]]:
    for component, model in host.models().items():
        composed = set()
        for path, module in model.named_modules():
            if hasattr(module, "base_layer"):
                raise InvalidRequest(
                    f"{component} still has adapters loaded (at {path}): call pipe.unload_lora_weights() first "
                    "(a PEFT model: model.unload())."
                )
            if isinstance(module, ComposedLinear | ComposedConv2d):
                if module.context is not owner:
                    raise InvalidRequest("Another composition is attached to this pipeline: detach it first.")
                composed.add(f"{path}.base")
                assert isinstance(module.base, nn.Linear | nn.Conv2d)
                yield f"{component}.{path}", module.base
            elif isinstance(module, nn.Linear | nn.Conv2d) and path not in composed:
                yield f"{component}.{path}", module


def _check_groups(key: str, module: nn.Module) -> None:
    if isinstance(module, nn.Conv2d) and module.groups != 1:
        raise BaseMismatch(f"Experts on grouped convolutions are not supported ({key} has {module.groups} groups).")


def _sites(host: Host, modules: Mapping[str, nn.Module], granularity: Granularity) -> dict[str, Site]:
    blocks = {f"{host.main}.{block.name}." if block.name else f"{host.main}.": block for block in host.blocks()}
    sites = {}
    for key, module in modules.items():
        component, _, path = key.partition(".")
        prefix = next((prefix for prefix in blocks if key.startswith(prefix)), None)
        if component != host.main:
            sites[key] = Site(key, BlockSpec(component, "encoder", 0), "text")
        elif prefix is None:
            sites[key] = _single(host, key, path, module, granularity)
        elif granularity == NETWORK:
            sees = host.sees(blocks[prefix], key.removeprefix(prefix))
            network = BlockSpec(NETWORK, "network", host.network_width)
            sites[key] = Site(key, network, "row" if sees == "text" else sees)
        else:
            block, leaf = blocks[prefix], key.removeprefix(prefix)
            sees = host.sees(block, leaf)
            shares = f"{key.rpartition('.')[0]}|{sees}" if _reads_together(leaf) else ""
            sites[key] = Site(key, _place(host, block, leaf, path, module, sees, granularity), sees, shares)
    return sites


def _single(host: Host, key: str, path: str, module: nn.Module, granularity: Granularity) -> Site:
    """A site outside all blocks: the network's gate, or a gate of its own where every matrix has one."""
    if granularity == "matrix":
        return Site(key, BlockSpec(path, "matrix", _width(module)), "image")
    sees: Sees = "image" if set(path.split(".")) & _IMAGE_OUTSIDE else "row"
    return Site(key, BlockSpec(NETWORK, "network", host.network_width), sees)


def _place(
    host: Host, block: BlockSpec, leaf: str, path: str, module: nn.Module, sees: Sees, granularity: Granularity
) -> BlockSpec:
    if granularity == "matrix":
        width = _width(module)
        return BlockSpec(path, "matrix", width, width if sees == "text" else 0)
    layer = host.layer(block, leaf) if granularity == "layer" else ""
    if not layer:
        return block
    name = f"{block.name}.{layer}" if block.name else layer
    inside = host.models()[host.main].get_submodule(name)
    first = next(found for found in inside.modules() if isinstance(found, nn.Linear | nn.Conv2d))
    return BlockSpec(name, "layer", _width(first), block.text_width, stride=block.stride)


def _reads_together(leaf: str) -> bool:
    return leaf.rsplit(".", 1)[-1] in ("to_q", "to_k", "to_v", "q_proj", "k_proj", "v_proj", "q", "k", "v")


def _width(module: nn.Module) -> int:
    if isinstance(module, nn.Linear):
        return module.in_features
    assert isinstance(module, nn.Conv2d)
    return module.in_channels


def _used(
    host: Host, sites: Mapping[str, Site], modules: Mapping[str, nn.Module], granularity: Granularity
) -> Iterator[BlockSpec]:
    """Places in use, in the model's order, each knowing whether its image or its text side has targets."""
    order = {block.name: index for index, block in enumerate(host.blocks())}
    seen: dict[str, set[Sees]] = {}
    specs: dict[str, BlockSpec] = {}
    widths: dict[str, int] = {}  # of the first module that reads text: its input is what the text's gate sees
    for key, site in sites.items():
        if site.sees == "text":
            widths.setdefault(site.block.name, _width(modules[key]))
        seen.setdefault(site.block.name, set()).add(site.sees)
        specs.setdefault(site.block.name, site.block)
    names = list(specs)
    if granularity == "block":
        late = len(order)
        names.sort(key=lambda name: order.get(name, late + (specs[name].kind == "encoder")))
    for name in names:
        spec, kinds = specs[name], seen[name]
        text_width = widths.get(name, 0) if spec.text_width else 0
        image = bool(kinds - {"text"}) or spec.kind in ("network", "encoder")
        yield replace(spec, text_width=text_width, image=image)
