"""What a prompt turns into: the tensors that the UNet takes beside the latents."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Conditioning:
    """Encoded prompts. With guidance the unconditional rows come first, as diffusers orders them.

    Attributes:
        prompt_embeds: (rows, tokens, width) hidden states of the text towers.
        added: further conditions of the UNet by name, each (rows, …), or None where the family has none.
    """

    prompt_embeds: Tensor
    added: dict[str, Tensor] | None = None

    @property
    def unet_kwargs(self) -> dict[str, Any]:
        """Keyword arguments for ``pipe.unet(latents, t, **kwargs)``."""
        kwargs: dict[str, Any] = {"encoder_hidden_states": self.prompt_embeds}
        return kwargs if self.added is None else {**kwargs, "added_cond_kwargs": self.added}

    def rows(self, index: Tensor | slice | list[int]) -> Conditioning:
        """The chosen rows only."""
        added = None if self.added is None else {name: value[index] for name, value in self.added.items()}
        return Conditioning(self.prompt_embeds[index], added)

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> Conditioning:
        """The same conditions on another device."""
        added = None if self.added is None else {name: value.to(device, dtype) for name, value in self.added.items()}
        return Conditioning(self.prompt_embeds.to(device, dtype), added)

    @staticmethod
    def cat(first: Conditioning, second: Conditioning) -> Conditioning:
        """Rows of ``first``, then rows of ``second``."""
        added = None
        if first.added is not None and second.added is not None:
            added = {name: torch.cat([first.added[name], second.added[name]]) for name in first.added}
        return Conditioning(torch.cat([first.prompt_embeds, second.prompt_embeds]), added)
