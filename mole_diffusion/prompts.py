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

_CLIP_LENGTH = 77


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


def as_encoded(pipe: Any, texts: Sequence[str], *, clean_caption: bool = False) -> list[str]:
    """Texts as the pipeline rewrites them before its tokenizer: PixArt and its like lower-case them."""
    rewrite = getattr(pipe, "_text_preprocessing", None)
    return list(texts) if rewrite is None else rewrite(list(texts), clean_caption=clean_caption)


def trigger_ids(tokenizer: Any, experts: Sequence[Expert], pipe: Any = None) -> list[list[int]]:
    """Each expert's trigger as token ids, empty where it has none; as ``pipe`` would rewrite it first."""
    return [
        list(tokenizer(as_encoded(pipe, [expert.trigger])[0], add_special_tokens=False).input_ids)
        if expert.trigger
        else []
        for expert in experts
    ]


def prompt_spans(pipe: Any, prompts: Sequence[str], experts: Sequence[Expert]) -> Tensor:
    """(P, T, N) bool, tokenised exactly as the pipeline tokenises (CLIP lower-cases, pads and cuts at 77).

    Where CLIP's states come before those of a T5 (SD 3), triggers are found in CLIP's.
    """
    tokenizer = _reader(pipe)
    convert = getattr(pipe, "maybe_convert_prompt", None)
    texts = [convert(prompt, tokenizer) if convert else prompt for prompt in as_encoded(pipe, prompts)]
    length: dict[str, Any] = {"padding": "max_length", "max_length": tokenizer.model_max_length}
    if tokenizer.model_max_length > _CLIP_LENGTH:  # a T5: every call of its pipeline pads to a length of its own
        found = inspect.signature(pipe.encode_prompt).parameters.get("max_sequence_length")
        length = {"padding": True, "max_length": found.default if found else tokenizer.model_max_length}
    encoded = tokenizer(texts, truncation=True, return_tensors="pt", **length)
    return trigger_spans(encoded.input_ids, trigger_ids(tokenizer, experts, pipe))


def _reader(pipe: Any) -> Any:
    """The tokenizer behind the first text states that the main model reads; Flux has those of its T5 alone."""
    first, second = (getattr(pipe, name, None) for name in ("tokenizer", "tokenizer_2"))
    return second if first is None or type(second).__name__.startswith("T5") else first


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
        if prompts is not None:
            prompts = as_encoded(pipe, prompts, clean_caption=bool(bound.arguments.get("clean_caption", False)))
        heard(prompts, bool(bound.arguments.get("do_classifier_free_guidance", False)))
        return original(*args, **kwargs)

    pipe.__dict__["encode_prompt"] = encode_prompt

    def restore() -> None:
        if before is None:
            pipe.__dict__.pop("encode_prompt", None)
        else:
            pipe.__dict__["encode_prompt"] = before

    return restore
