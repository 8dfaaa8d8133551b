"""Where a phrase's tokens are looked at: cross-attention maps, recorded without changing the picture."""

from __future__ import annotations

from types import TracebackType
from typing import Any

import numpy as np
import torch
from torch import Tensor


class AttentionRecorder:
    """While attached, averages the attention that cross-attention layers pay to some tokens of the last row.

    Attach and detach are exact inverses: each layer keeps its processor, which is only wrapped meanwhile.
    """

    def __init__(self, unet: Any, positions: list[int]) -> None:
        self.layers = [module for name, module in unet.named_modules() if name.endswith(".attn2")]
        self.positions = positions
        self.maps: dict[int, Tensor] = {}
        self.counts: dict[int, int] = {}
        self._processors: list[Any] = []

    def __enter__(self) -> AttentionRecorder:
        self._processors = [layer.processor for layer in self.layers]
        for layer in self.layers:
            layer.processor = _Recording(layer.processor, self)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for layer, processor in zip(self.layers, self._processors, strict=True):
            layer.processor = processor

    def add(self, attention: Tensor) -> None:
        """Take one layer's attention (places,) of one step."""
        side = round(attention.numel() ** 0.5)
        if side * side != attention.numel() or side < 4:
            return
        heat = attention.reshape(side, side).float().cpu()
        self.maps[side] = self.maps.get(side, torch.zeros(side, side)) + heat
        self.counts[side] = self.counts.get(side, 0) + 1

    def heat(self, size: int) -> np.ndarray | None:
        """The mean map (size, size), each grid counted alike; None where no layer could be recorded."""
        if not self.maps:
            return None
        grids = [(grid / self.counts[side])[None, None] for side, grid in self.maps.items()]
        scaled = [torch.nn.functional.interpolate(grid / grid.max(), (size, size), mode="bilinear") for grid in grids]
        return torch.stack(scaled).mean(0)[0, 0].numpy()


class _Recording:
    """A processor that does what the original does, and shows the recorder the attention of the last row."""

    def __init__(self, original: Any, recorder: AttentionRecorder) -> None:
        self.original, self.recorder = original, recorder

    def __call__(
        self, attn: Any, hidden_states: Tensor, encoder_hidden_states: Tensor | None = None, **more: Any
    ) -> Tensor:
        if encoder_hidden_states is not None and hidden_states.ndim == 3:
            self.recorder.add(self._attention(attn, hidden_states, encoder_hidden_states))
        return self.original(attn, hidden_states, encoder_hidden_states=encoder_hidden_states, **more)

    @torch.no_grad()
    def _attention(self, attn: Any, hidden_states: Tensor, encoder_hidden_states: Tensor) -> Tensor:
        query = attn.head_to_batch_dim(attn.to_q(hidden_states))
        key = attn.head_to_batch_dim(attn.to_k(encoder_hidden_states))
        scores = attn.get_attention_scores(query, key)  # (rows·heads, places, tokens)
        heads = scores[-attn.heads :].mean(0)
        return heads[:, self.recorder.positions].mean(-1)


def token_positions(tokenizer: Any, prompt: str, phrase: str) -> list[int]:
    """Places of ``phrase``'s tokens in the tokenised ``prompt``, counted with its start token; empty if absent."""
    words = tokenizer(prompt, truncation=True, max_length=tokenizer.model_max_length).input_ids
    wanted = tokenizer(phrase, add_special_tokens=False).input_ids
    for start in range(len(words) - len(wanted) + 1):
        if wanted and words[start : start + len(wanted)] == wanted:
            return list(range(start, start + len(wanted)))
    return []
