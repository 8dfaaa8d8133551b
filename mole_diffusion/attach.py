"""Put composed layers into a model and take them out again: exact inverses."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

from torch import Tensor, nn

from mole_diffusion.context import Context, block_hook
from mole_diffusion.hosts import Host
from mole_diffusion.layers import ComposedConv2d, ComposedLinear, ExpertBank, SharedDown, compose_layer
from mole_diffusion.plan import Plan, find_module


class Attachment:
    """One attached composition; :meth:`undo` restores the model to what it was.

    The base's module objects stay alive inside the composed layers and return to their places.

    Attributes:
        layers: canonical key → composed layer.
        gated: the gated experts, whose triggers the host looks for; follows the experts when they are exchanged.
    """

    def __init__(self, host: Host, plan: Plan, context: Context) -> None:
        self.layers: dict[str, ComposedLinear | ComposedConv2d] = {}
        self.gated = list(plan.gated)
        self._undo = ExitStack()
        try:
            host.check()
            self._freeze(host)
            self._swap(host, plan, context)
            self._share(plan)
            if any(expert.embeddings for expert in plan.experts):
                self._undo.callback(host.lend(plan.experts))
            self._undo.callback(host.watch(context, self.gated))
            self._hook(host, plan, context)
        except BaseException:
            self._undo.close()
            raise

    def undo(self) -> None:
        """Take everything off, last first."""
        self._undo.close()
        self.layers = {}

    def _freeze(self, host: Host) -> None:
        """Base parameters take no gradient while a composition is attached."""
        thawed = [p for model in host.models().values() for p in model.parameters() if p.requires_grad]
        for parameter in thawed:
            parameter.requires_grad_(False)
        self._undo.callback(_thaw, thawed)

    def _swap(self, host: Host, plan: Plan, context: Context) -> None:
        for key, pairs in plan.pairs.items():
            parent, attribute, module = find_module(host, key)
            weight = module.weight
            assert isinstance(weight, Tensor)
            layer = compose_layer(module, ExpertBank(pairs, weight), context, key)
            self._undo.callback(setattr, parent, attribute, module)
            setattr(parent, attribute, layer)
            self.layers[key] = layer

    def _share(self, plan: Plan) -> None:
        """Modules that read the same input share one product; all of them the memory for merged weights."""
        rooms: dict[Any, Tensor] = {}
        for layer in self.layers.values():
            layer.rooms = rooms
        groups: dict[str, list[ComposedLinear]] = {}
        for key, site in plan.sites.items():
            layer = self.layers[key]
            if site.shares and isinstance(layer, ComposedLinear):
                groups.setdefault(site.shares, []).append(layer)
        for members in groups.values():
            text = plan.sites[members[0].key].sees == "text"
            if len(members) > 1 or text:
                SharedDown(members, keep=text)

    def _hook(self, host: Host, plan: Plan, context: Context) -> None:
        if context.gate.looks == "nothing":
            return
        main = host.models()[host.main]
        for block in plan.blocks:
            if block.kind in ("transformer", "resnet", "layer"):
                module: nn.Module = main.get_submodule(block.name)
                handle = module.register_forward_pre_hook(block_hook(context, block.name), with_kwargs=True)
                self._undo.callback(handle.remove)


def _thaw(parameters: Sequence[nn.Parameter]) -> None:
    for parameter in parameters:
        parameter.requires_grad_(True)
