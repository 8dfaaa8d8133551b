"""What is known of the prompts behind a batch: guidance, and where each trigger stands."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import wraps
from typing import Any

import torch
from torch import Tensor

from mole_diffusion.errors import InvalidRequest
from mole_diffusion.experts.canonical import Expert
from mole_diffusion.functional import trigger_spans


@dataclass(frozen=True)
class Conditions:
    """The batch that the next UNet calls will see.

    Attributes:
        guidance: the first half of every batch is unconditional.
        spans: (P, T, N) bool for P prompts, or None where the prompts are not known.
    """

    guidance: bool = False
    spans: Tensor | None = None

    def rows(self, batch: int, reuse: bool) -> int:
        """How many rows gates compute.

        Raises:
            InvalidRequest: guidance with an odd batch.
        """
        if not self.guidance:
            return batch
        if batch % 2:
            raise InvalidRequest(
                f"The last prompts were announced with guidance, but {batch} rows came: call "
                "composition.condition(prompts, guidance=False) before a batch without unconditional rows."
            )
        return batch // 2 if reuse else batch

    def spans_for(self, batch: int, reuse: bool, tokens: int) -> Tensor:
        """(rows, tokens, N): every prompt repeated for its pictures; nothing in unconditional rows.

        Raises:
            InvalidRequest: prompts unknown, or they do not fit the batch.
        """
        if self.spans is None:
            raise InvalidRequest(
                "This gate needs the prompts: generate through the pipeline, or call "
                "composition.condition(prompts, guidance=…) before the UNet."
            )
        wanted = batch // 2 if self.guidance else batch
        prompts, length, _ = self.spans.shape
        if wanted % prompts or length != tokens:
            raise InvalidRequest(
                f"{prompts} prompts of {length} tokens were announced, but {wanted} rows of {tokens} tokens came: call "
                "composition.condition with the prompts of this batch."
            )
        spans = self.spans.repeat_interleave(wanted // prompts, 0)
        return torch.cat([torch.zeros_like(spans), spans]) if self.guidance and not reuse else spans


def trigger_ids(tokenizer: Any, experts: Sequence[Expert]) -> list[list[int]]:
    """Each expert's trigger as token ids, empty where it has none."""
    return [
        list(tokenizer(expert.trigger, add_special_tokens=False).input_ids) if expert.trigger else []
        for expert in experts
    ]


def prompt_spans(pipe: Any, prompts: Sequence[str], experts: Sequence[Expert]) -> Tensor:
    """(P, T, N) bool, tokenised exactly as the pipeline tokenises (CLIP lower-cases, pads and cuts at 77)."""
    tokenizer = pipe.tokenizer if getattr(pipe, "tokenizer", None) is not None else pipe.tokenizer_2
    convert = getattr(pipe, "maybe_convert_prompt", None)
    texts = [convert(prompt, tokenizer) if convert else prompt for prompt in prompts]
    encoded = tokenizer(
        texts, padding="max_length", max_length=tokenizer.model_max_length, truncation=True, return_tensors="pt"
    )
    return trigger_spans(encoded.input_ids, trigger_ids(tokenizer, experts))


def listen(pipe: Any, heard: Callable[[list[str] | None, bool], None]) -> Callable[[], None]:
    """Wrap ``pipe.encode_prompt`` on the instance, so that ``heard(prompts, guidance)`` runs before every call.

    Returns:
        A function that takes the wrapper off again and leaves the instance as it was.
    """
    if not hasattr(pipe, "encode_prompt"):
        return lambda: None
    original = pipe.encode_prompt
    before = pipe.__dict__.get("encode_prompt")
    signature = inspect.signature(original)

    @wraps(original)
    def encode_prompt(*args: Any, **kwargs: Any) -> Any:
        bound = signature.bind(*args, **kwargs)
        bound.apply_defaults()
        prompt = bound.arguments.get("prompt")
        prompts = None if prompt is None else [prompt] if isinstance(prompt, str) else list(prompt)
        heard(prompts, bool(bound.arguments.get("do_classifier_free_guidance", False)))
        return original(*args, **kwargs)

    pipe.__dict__["encode_prompt"] = encode_prompt

    def restore() -> None:
        if before is None:
            pipe.__dict__.pop("encode_prompt", None)
        else:
            pipe.__dict__["encode_prompt"] = before

    return restore
