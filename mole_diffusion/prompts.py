"""What is known of the prompts behind a batch: guidance, and where each trigger stands."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import wraps
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mole_diffusion.errors import InvalidRequest
from mole_diffusion.experts.canonical import Expert
from mole_diffusion.functional import trigger_spans

_LONGEST = 512


@dataclass(frozen=True)
class Conditions:
    """The batch that the next UNet calls will see.

    Attributes:
        guidance: the first half of every batch is unconditional.
        spans: (P, T, N) bool for P prompts, or None where the prompts are not known.
        subsets: (P, N) bool, which experts each prompt may use; None = all.
    """

    guidance: bool = False
    spans: Tensor | None = None
    subsets: Tensor | None = None

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
        if wanted % prompts or length > tokens:
            raise InvalidRequest(
                f"{prompts} prompts of {length} tokens were announced, but {wanted} rows of {tokens} tokens came: call "
                "composition.condition with the prompts of this batch."
            )
        spans = F.pad(self.spans.repeat_interleave(wanted // prompts, 0), (0, 0, 0, tokens - length))
        return torch.cat([torch.zeros_like(spans), spans]) if self.guidance and not reuse else spans

    def mask_for(self, mask: Tensor, batch: int, reuse: bool) -> Tensor:
        """``mask`` (N,) itself, or (rows, 1, N) where prompts have their own subsets.

        Raises:
            InvalidRequest: the subsets do not fit the batch.
        """
        if self.subsets is None:
            return mask
        wanted = batch // 2 if self.guidance else batch
        prompts = self.subsets.shape[0]
        if wanted % prompts:
            raise InvalidRequest(
                f"Subsets of experts were given for {prompts} prompts, but {wanted} rows came: give one per prompt."
            )
        rows = (self.subsets.to(mask.device) & mask).repeat_interleave(wanted // prompts, 0).unsqueeze(1)
        return torch.cat([rows, rows]) if self.guidance and not reuse else rows


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
    fixed = tokenizer.model_max_length <= _LONGEST  # a T5's is unlimited; its pipeline pads further than we need
    length = {"padding": "max_length", "max_length": tokenizer.model_max_length} if fixed else {"padding": True}
    encoded = tokenizer(texts, truncation=fixed, return_tensors="pt", **length)
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
