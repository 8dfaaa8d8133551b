"""What gates said: the state of the running forward pass, and what remains of the last one."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from mole_diffusion.functional import resample
from mole_diffusion.gates.protocol import Run

Grid = tuple[int, int]


@dataclass
class State:
    """What one place's gate said in the running forward pass; (rows or 1, places or 1, N), before the gain."""

    probabilities: Tensor
    run: Run
    grid: Grid = (1, 1)
    gain: Tensor | None = None
    text: State | None = None
    looker: str = ""  # the site at which the gate looked; if it asks again, checkpointing runs the block once more
    waits: bool = False  # only text modules have run so far: the gate looks at the first that sees the image


@dataclass(frozen=True)
class Record:
    """What a gate said in the last forward pass: probabilities before the gain, (rows or 1, L or 1, N)."""

    probabilities: Tensor
    gain: Tensor | None
    grid: Grid
    spans: Tensor | None = None

    @property
    def weights(self) -> Tensor:
        """What the experts get: probabilities times gain."""
        return self.probabilities if self.gain is None else self.probabilities * self.gain

    def places(self, token_mask: Tensor | None) -> Tensor | None:
        """(rows, L) weights of the places that a token gate's mean runs over; None = all alike.

        Args:
            token_mask: (B, H, W) where the subjects are; text-token gates count the tokens of triggers instead.
        """
        rows, length, _ = self.probabilities.shape
        if length == 1:
            return None
        if self.spans is not None:
            owned = self.spans.any(-1)
            return owned if bool(owned.any()) else None
        if token_mask is None or self.grid[0] * self.grid[1] != length:
            return None
        pooled = resample(token_mask[-rows:].float().unsqueeze(1), self.grid)
        return pooled.to(self.probabilities.device).flatten(1)
