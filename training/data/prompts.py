"""Prompts encoded once and looked up by text, or encoded anew in every step while the text encoders learn."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch

from mole_diffusion.bases import Base, Conditioning

BATCH = 16


class EncodedPrompts:
    """The conditioning of each different prompt; rows for a batch are looked up, not encoded again."""

    def __init__(self, base: Base, pipe: Any, prompts: Iterable[str], resolution: int) -> None:
        """Encode with whatever is attached to the text encoders now; pictures are square, of ``resolution`` pixels."""
        self.index = {prompt: number for number, prompt in enumerate(dict.fromkeys(prompts))}
        self.table = _encode(base, pipe, list(self.index), resolution)

    def rows(self, prompts: Sequence[str]) -> Conditioning:
        """The conditioning of a batch, one row for each prompt."""
        return self.table.rows([self.index[prompt] for prompt in prompts])


class LivePrompts:
    """Prompts encoded whenever they are asked for, with gradients into what is attached to the text encoders."""

    def __init__(self, base: Base, pipe: Any, prompts: Iterable[str], resolution: int) -> None:
        """Pictures are square, of ``resolution`` pixels; ``prompts`` are named for what looks them up instead."""
        self.base, self.pipe, self.size = base, pipe, (resolution, resolution)

    def rows(self, prompts: Sequence[str]) -> Conditioning:
        """The conditioning of a batch, one row for each prompt."""
        return self.base.encode(self.pipe, list(prompts), size=self.size)


@torch.no_grad()
def _encode(base: Base, pipe: Any, prompts: list[str], resolution: int) -> Conditioning:
    size = (resolution, resolution)
    parts = [base.encode(pipe, prompts[at : at + BATCH], size=size) for at in range(0, len(prompts), BATCH)]
    table = parts[0]
    for part in parts[1:]:
        table = Conditioning.cat(table, part)
    return table
