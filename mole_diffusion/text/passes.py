"""How a language model runs: which pass reads a prompt, which goes on from one, and which tokens are the prompt."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import wraps
from typing import Any

import torch
from torch import Tensor, nn

from mole_diffusion.errors import InvalidRequest
from mole_diffusion.functional import trigger_spans
from mole_diffusion.hosts.protocol import Listener, Step

_IGNORED = -100
_PROMPTS = ("inputs", "input_ids", "inputs_embeds")


@dataclass(frozen=True)
class Prompt:
    """What is known of the prompts of a batch.

    Attributes:
        text: (P, T, d) token embeddings.
        places: (P, T) bool, the tokens that count.
        spans: (P, T, N) bool, where triggers stand; None = unknown.
    """

    text: Tensor
    places: Tensor
    spans: Tensor | None

    def repeated(self, rows: int) -> Prompt | None:
        """For a batch that holds every prompt several times in a row, as beams do; None where it cannot."""
        count = self.text.shape[0]
        if rows == count:
            return self
        if rows % count:
            return None
        text, places = (t.repeat_interleave(rows // count, 0) for t in (self.text, self.places))
        return Prompt(text, places, None if self.spans is None else self.spans.repeat_interleave(rows // count, 0))


class Passes:
    """Tells a listener of every pass of one model.

    All rows of one prompt have the same weights, so beams may change places within the cache.
    """

    def __init__(self, model: Any, listener: Listener, triggers: Callable[[], Sequence[Sequence[int]]] | None) -> None:
        self.model = model
        self.listener = listener
        self.triggers = triggers
        self._prompt: Prompt | None = None
        self._length = 0  # tokens that the model has seen since the prompt began
        self._fresh = False  # the encoder has run and no decoder since
        self._generating = False
        self._announced: tuple[int | None, Tensor | None] = (None, None)

    def watch(self) -> Callable[[], None]:
        """Hooks on; the returned function takes them off."""
        model = self.model
        if model.config.is_encoder_decoder:
            starts = {model.get_encoder(): self._encode, model.get_decoder(): self._decode}
        else:
            starts = {model: self._run}
        with ExitStack() as stack:
            for module, start in starts.items():
                stack.callback(module.register_forward_pre_hook(_hook(module, start), with_kwargs=True).remove)
            stack.callback(model.register_forward_hook(lambda *_: self.listener.end()).remove)
            if hasattr(model, "generate"):
                stack.callback(self._wrap(model))
            return stack.pop_all().close
        raise AssertionError("unreachable")

    def _wrap(self, model: Any) -> Callable[[], None]:
        """``generate`` on the instance announces its prompt."""
        original, before = model.generate, model.__dict__.get("generate")

        @wraps(original)
        def generate(*args: Any, **kwargs: Any) -> Any:
            settings = kwargs.get("generation_config") or (args[1] if len(args) > 1 else model.generation_config)
            if kwargs.get("prefill_chunk_size") or getattr(settings, "prefill_chunk_size", None):
                raise InvalidRequest("Gates see a prompt as a whole: generate without prefill_chunk_size.")
            given = next((x for x in (*args[:1], *map(kwargs.get, _PROMPTS)) if x is not None), None)
            self._announced = (None if given is None else given.shape[1], kwargs.get("attention_mask"))
            self._prompt, self._generating = None, True
            self.listener.hear(None, False)
            try:
                return original(*args, **kwargs)
            finally:
                self._prompt, self._generating, self._announced = None, False, (None, None)

        def restore() -> None:
            if before is None:
                model.__dict__.pop("generate", None)
            else:
                model.__dict__["generate"] = before

        model.__dict__["generate"] = generate
        return restore

    # A pass starts.

    def _run(self, given: Mapping[str, Any]) -> None:
        """The whole of a model that has one stack."""
        x = _input(given)
        (rows, length), past = x.shape[:2], _past(given)
        if past or (self._generating and self._prompt is not None):
            prompt = None if self._prompt is None or past > self._length else self._prompt.repeated(rows)
            self._length = max(self._length, past + length)
            self._begin(rows, x.device, prompt, after="prompt")
            return
        self._length = length
        self._prompt = self._read(given, self._counted(given, rows, length))
        self._begin(rows, x.device, self._prompt, places=self._prompt.places)

    def _encode(self, given: Mapping[str, Any]) -> None:
        x = _input(given)
        self._fresh = True
        mask = _flat(given.get("attention_mask"))
        mask = torch.ones(x.shape[:2], dtype=torch.bool, device=x.device) if mask is None else mask
        self._prompt = self._read(given, mask)
        self._begin(x.shape[0], x.device, self._prompt, places=self._prompt.places)

    def _decode(self, given: Mapping[str, Any]) -> None:
        x, memory = _input(given), given.get("encoder_hidden_states")
        rows = x.shape[0]
        prompt = None if self._prompt is None else self._prompt.repeated(rows)
        if prompt is not None and memory is not None and memory.shape[1] != prompt.text.shape[1]:
            prompt = None
        first = torch.zeros(x.shape[:2], dtype=torch.bool, device=x.device)
        first[:, 0] = True
        after = "prompt" if _past(given) or prompt is None else "part" if self._fresh else "nothing"
        self._fresh = False
        self._begin(rows, x.device, prompt, places=first, memory=memory, after=after)

    def _begin(self, rows: int, device: torch.device, prompt: Prompt | None, **more: Any) -> None:
        if prompt is not None:
            more |= {"text": prompt.text, "text_places": prompt.places, "spans": prompt.spans}
        self.listener.begin(Step(rows, device, **more))

    # What it reads.

    @torch.no_grad()
    def _read(self, given: Mapping[str, Any], places: Tensor) -> Prompt:
        ids, text = given.get("input_ids"), given.get("inputs_embeds")
        if text is None:
            text = self.model.get_input_embeddings()(ids)
        spans = None if self.triggers is None or ids is None else trigger_spans(ids, self.triggers())
        return Prompt(text.detach(), places, spans)

    def _counted(self, given: Mapping[str, Any], rows: int, length: int) -> Tensor:
        """(rows, length) bool: the tokens of the prompt."""
        x = _input(given)
        mask = self._mask(given, rows)
        counted = torch.ones(rows, length, dtype=torch.bool, device=x.device) if mask is None else mask[:, -length:]
        asked = self._announced[0]
        if asked is not None:  # assisted decoding brings guesses with the prompt
            counted = counted & (torch.arange(length, device=x.device) < asked)
        labels = given.get("labels")
        if labels is None or labels.shape != counted.shape or not self.model.can_generate():
            return counted
        prompt = counted & ((labels != _IGNORED).cumsum(1) == 0)
        first = counted & (counted.cumsum(1) == 1)
        return torch.where(prompt.any(1, keepdim=True), prompt, first)

    def _mask(self, given: Mapping[str, Any], rows: int) -> Tensor | None:
        mask = given.get("attention_mask")
        if mask is None or _flat(mask) is not None:
            return _flat(mask)
        asked = _flat(self._announced[1])
        if asked is None:
            raise InvalidRequest(
                "The prompt's tokens cannot be told from a ready-made mask: give the attention_mask as (rows, tokens), "
                "to generate too."
            )
        return asked.repeat_interleave(rows // asked.shape[0], 0)


def _hook(module: nn.Module, start: Callable[[Mapping[str, Any]], None]) -> Callable[..., None]:
    names = list(inspect.signature(module.forward).parameters)

    def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = {**dict(zip(names, args, strict=False)), **kwargs}
        if given.get("input_ids") is not None or given.get("inputs_embeds") is not None:  # else the model complains
            start(given)

    return hook


def _input(given: Mapping[str, Any]) -> Tensor:
    """(rows, L) ids or (rows, L, d) embeddings."""
    ids = given.get("input_ids")
    return given["inputs_embeds"] if ids is None else ids


def _past(given: Mapping[str, Any]) -> int:
    """Tokens in the cache."""
    cache = given.get("past_key_values")
    return int(cache.get_seq_length()) if cache is not None else 0


def _flat(mask: Any) -> Tensor | None:
    """A mask (rows, L) as bool; None for any other."""
    return mask.bool() if isinstance(mask, Tensor) and mask.ndim == 2 else None
