"""Put composed layers into a pipeline and take them out again: exact inverses."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

from torch import Tensor, nn

from mole_diffusion.context import Context
from mole_diffusion.layers import ComposedConv2d, ComposedLinear, ExpertBank, compose_layer
from mole_diffusion.plan import Plan, find_module
from mole_diffusion.prompts import listen, trigger_ids

_TOKENIZERS = {"text_encoder": "tokenizer", "text_encoder_2": "tokenizer_2"}


class Attachment:
    """One attached composition; :meth:`undo` restores the pipeline to what it was.

    The base's module objects stay alive inside the composed layers and return to their places.

    Attributes:
        layers: canonical key → composed layer.
    """

    def __init__(self, pipe: Any, plan: Plan, context: Context, heard: Callable[..., None]) -> None:
        self.layers: dict[str, ComposedLinear | ComposedConv2d] = {}
        self._undo = ExitStack()
        try:
            self._freeze(pipe)
            self._swap(pipe, plan, context)
            self._hook(pipe, plan, context)
            self._undo.callback(listen(pipe, heard))
        except BaseException:
            self._undo.close()
            raise

    def undo(self) -> None:
        """Take everything off, last first."""
        self._undo.close()
        self.layers = {}

    def _freeze(self, pipe: Any) -> None:
        """Base parameters take no gradient while a composition is attached."""
        models = [getattr(pipe, name, None) for name in ("unet", *_TOKENIZERS)]
        thawed = [p for model in models if isinstance(model, nn.Module) for p in model.parameters() if p.requires_grad]
        for parameter in thawed:
            parameter.requires_grad_(False)
        self._undo.callback(_thaw, thawed)

    def _swap(self, pipe: Any, plan: Plan, context: Context) -> None:
        for key, pairs in plan.pairs.items():
            parent, attribute, module = find_module(pipe, key)
            weight = module.weight
            assert isinstance(weight, Tensor)
            layer = compose_layer(module, ExpertBank(pairs, weight), context, key)
            self._undo.callback(setattr, parent, attribute, module)
            setattr(parent, attribute, layer)
            self.layers[key] = layer

    def _hook(self, pipe: Any, plan: Plan, context: Context) -> None:
        triggers: dict[str, list[list[int]]] = {}
        for block in plan.blocks:
            if block.kind == "encoder":
                tokenizer = getattr(pipe, _TOKENIZERS[block.name], None)
                if tokenizer is not None:
                    triggers[block.name] = trigger_ids(tokenizer, plan.gated)
                self._before(getattr(pipe, block.name), _encoder_hook(context, block.name))
            elif block.kind != "network" and context.gate.dynamic:
                self._before(pipe.unet.get_submodule(block.name), _block_hook(context, block.name))
        context.set_triggers(triggers)
        self._before(pipe.unet, context.before_unet)
        handle = pipe.unet.register_forward_hook(lambda *_: context.after_unet())
        self._undo.callback(handle.remove)

    def _before(self, module: nn.Module, hook: Callable[..., None]) -> None:
        handle = module.register_forward_pre_hook(hook, with_kwargs=True)
        self._undo.callback(handle.remove)


def _block_hook(context: Context, name: str) -> Callable[..., None]:
    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        hidden = args[0] if args else kwargs["hidden_states" if "hidden_states" in kwargs else "input_tensor"]
        context.before_block(name, hidden)

    return hook


def _encoder_hook(context: Context, name: str) -> Callable[..., None]:
    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        context.before_encoder(name, args[0] if args else kwargs["input_ids"])

    return hook


def _thaw(parameters: Sequence[nn.Parameter]) -> None:
    for parameter in parameters:
        parameter.requires_grad_(True)
