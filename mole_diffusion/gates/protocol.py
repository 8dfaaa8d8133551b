"""The one protocol of all gates, and what they see of a run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol

from torch import Tensor

NETWORK = "network"
BlockKind = Literal["transformer", "resnet", "network", "encoder"]


@dataclass(frozen=True)
class BlockSpec:
    """One gated place.

    Attributes:
        name: module path inside the UNet, "network", "text_encoder" or "text_encoder_2".
        kind: what sort of block.
        width: channels of the hidden state at its input.
        text_width: channels of the text states, where keys or values of its cross-attention are targets; else 0.
        image: does any target see image tokens or the row as a whole?
    """

    name: str
    kind: BlockKind
    width: int
    text_width: int = 0
    image: bool = True


@dataclass(frozen=True)
class Run:
    """What one forward pass of the UNet (or of a text encoder) offers to gates.

    Rows are those that gates compute: with guidance and reuse the conditional half only.

    Attributes:
        mask: (N,) bool over the gated experts, True = active.
        time: (rows, 64) features of the timestep, or None.
        text: (rows, T, c) text states, or None.
        spans: (rows, T, N) bool, where each expert's trigger stands; None = prompts unknown.
    """

    mask: Tensor
    time: Tensor | None = None
    text: Tensor | None = None
    spans: Tensor | None = None


class Gate(Protocol):
    """Weights for every kind of target; (rows or 1, places or 1, N), fp32. Implementations are ``nn.Module``.

    Attributes:
        dynamic: does :meth:`image` look at the hidden state?
        needs_spans: are the prompts needed?
        guidance_rows: "reuse" or "own".
    """

    dynamic: bool
    needs_spans: bool
    guidance_rows: str

    def image(self, block: BlockSpec, tokens: Tensor | None, run: Run) -> Tensor | None:
        """For targets that see image tokens; ``tokens`` (rows, L, width) is the block's input, None if not dynamic.

        None = there is no gate here: NLA.
        """
        ...

    def text(self, block: BlockSpec, text: Tensor, run: Run) -> Tensor | None:
        """For keys and values of cross-attention, ``text`` (rows, T, c); None = as :meth:`image`."""
        ...

    def network(self, block: BlockSpec, run: Run) -> Tensor:
        """For targets outside any block."""
        ...

    def encoder(self, block: BlockSpec, run: Run) -> Tensor:
        """For targets inside a text encoder; ``run.spans`` are those of the ids that it is given."""
        ...

    def gain(self, block: BlockSpec, text: bool) -> Tensor | None:
        """A factor on all weights of the block's image or text gate."""
        ...

    def static(self, block: BlockSpec, mask: Tensor) -> Tensor | None:
        """(N,) weights of a block if they depend on no input, else None; what merging needs."""
        ...
