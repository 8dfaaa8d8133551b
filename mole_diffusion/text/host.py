"""Language models of transformers: where blocks are and what their modules read, found by structure alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from mole_diffusion.errors import InvalidRequest
from mole_diffusion.experts.canonical import Expert
from mole_diffusion.functional import trigger_spans
from mole_diffusion.gates.protocol import BlockSpec, Sees
from mole_diffusion.hosts.protocol import Listener
from mole_diffusion.layers import ComposedLinear
from mole_diffusion.prompts import trigger_ids
from mole_diffusion.text.passes import Passes

COMPONENT = "model"
_KEYS = ("k", "k_proj", "key")
_VALUES = ("v", "v_proj", "value")


class TextHost:
    """A ``transformers.PreTrainedModel``, or anything with such a ``model`` and a ``tokenizer``.

    Experts name their targets "model.<path>". A block is one encoder or decoder layer, a layer its attention or MLP.
    Keys and values of a decoder's cross-attention read text, which is the encoder's states; everything else reads its
    own tokens. What lies outside the layers, such as the head, has the gate of the network.

    Scope token: every token's weights come from its own hidden state, so a cache of keys and values changes nothing.

    Scope sample: gates pool over the prompt, padding left out.

    - Causal: the prompt is what ``generate`` is given, or, in training, a row's tokens before its first label other
      than −100 (its first token, where there are none). A forward pass with neither counts every attended token. Later
      passes of one generation, with a cache or without, keep the weights of the prompt.
    - Encoder-decoder: the prompt is the encoder's input. A decoder's gates pool over the encoder's last states, because
      its own tokens are the answer, of which nothing but the start token is there when generation begins. Modules of
      another width than those states, such as output projections under matrix gates, look at that start token.

    See :class:`mole_diffusion.hosts.Host`.
    """

    main = COMPONENT

    def __init__(self, target: Any) -> None:
        self.model: Any = target if isinstance(target, nn.Module) else target.model
        self.tokenizer = None if target is self.model else getattr(target, "tokenizer", None)
        self.network_width = int(self.model.get_input_embeddings().weight.shape[1])

    def models(self) -> Mapping[str, nn.Module]:
        """The model alone."""
        return {COMPONENT: self.model}

    def check(self) -> None:
        """See :meth:`Host.check`."""
        if any(parameter.is_meta for parameter in self.model.parameters()):
            raise InvalidRequest(
                "The weights of this model are not all in memory (offloaded by accelerate): experts cannot be placed "
                "beside them. Load it without offloading."
            )

    def blocks(self) -> Sequence[BlockSpec]:
        """The members of the outermost lists of layers."""
        return [_block(path, layer, self._answers(path)) for path, layer in _layers(self.model)]

    def layer(self, block: BlockSpec, leaf: str) -> str:
        """self_attn, mlp, layer.0, …: the child of the block that holds the module."""
        module, path = self.model.get_submodule(block.name), ""
        for name in leaf.split("."):
            module, path = module.get_submodule(name), f"{path}.{name}" if path else name
            if not isinstance(module, nn.ModuleList):
                break
        return "" if path == leaf else path

    def sees(self, block: BlockSpec, leaf: str) -> Sees:
        """Tokens of its own stack, or the encoder's states."""
        cross = _cross_attention(self.model.get_submodule(block.name)) if block.text_width else None
        parent, _, name = leaf.rpartition(".")
        return "text" if cross is not None and parent == cross[0] and name in _KEYS + _VALUES else "image"

    def spans(self, prompts: Sequence[str], experts: Sequence[Expert]) -> Tensor:
        """See :meth:`Host.spans`."""
        if self.tokenizer is None:
            raise InvalidRequest(
                "Triggers are found by the tokenizer: compose on something that has both, the model as .model and its "
                "tokenizer as .tokenizer, such as a text-generation pipeline."
            )
        ids = self.tokenizer(list(prompts), padding=len(prompts) > 1, return_tensors="pt").input_ids
        return trigger_spans(ids, trigger_ids(self.tokenizer, experts))

    def lend(self, experts: Sequence[Expert]) -> Callable[[], None]:
        """Experts of language models bring none."""
        raise InvalidRequest("An expert brings tokens of its own, which language models are not taught here.")

    def watch(self, listener: Listener, experts: Sequence[Expert]) -> Callable[[], None]:
        """Forward hooks on the model, or on its encoder and decoder; a wrapper on its ``generate``."""
        self._refuse_routed(experts)
        words = self.tokenizer
        return Passes(self.model, listener, None if words is None else lambda: trigger_ids(words, experts)).watch()

    def _refuse_routed(self, experts: Sequence[Expert]) -> None:
        """Layers that route tokens among experts of their own see all rows' tokens as one list."""
        for key in (key for expert in experts for key in expert.modules):
            module = self.model
            for name in key.split(".")[1:]:
                if "experts" in dict(module.named_children()):
                    raise InvalidRequest(
                        f"{key} is part of a mixture-of-experts layer of this model, which mixes the tokens of all "
                        "rows, so that no gate can tell whose they are: use experts on the attention alone."
                    )
                module = module.get_submodule(name)

    def _answers(self, path: str) -> bool:
        """Is this layer in a decoder that reads an encoder's states?"""
        if not self.model.config.is_encoder_decoder:
            return False
        decoder = self.model.get_decoder()
        name = next((name for name, module in self.model.named_modules() if module is decoder), None)
        return name is not None and path.startswith(f"{name}.")


def _layers(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Members of the outermost ModuleLists that hold linear layers throughout."""
    found: list[str] = []
    for path, module in model.named_modules():
        if not isinstance(module, nn.ModuleList) or path.startswith(tuple(f"{outer}." for outer in found)):
            continue
        if len(module) and all(_first(member) is not None for member in module):
            found.append(path)
            yield from ((f"{path}.{index}", member) for index, member in enumerate(module))


def _block(path: str, layer: nn.Module, answers: bool) -> BlockSpec:
    first = _first(layer)
    cross = _cross_attention(layer) if answers else None
    assert first is not None
    return BlockSpec(path, "transformer", first.in_features, 0 if cross is None else cross[1].in_features)


def _first(module: nn.Module) -> nn.Linear | None:
    return next((found for found in module.modules() if isinstance(found, nn.Linear)), None)


def _cross_attention(layer: nn.Module) -> tuple[str, Any] | None:
    """Path and key projection of a decoder layer's second attention; the first one is its own."""
    found = [
        (path, child)
        for path, module in layer.named_modules()
        for name, child in module.named_children()
        if name in _KEYS and isinstance(child, nn.Linear | ComposedLinear)
    ]
    return found[1] if len(found) > 1 else None
