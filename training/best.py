"""The best weights of a training so far, and whether waiting for better ones still makes sense."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor


@dataclass
class Best:
    """Keeps the weights with the highest value.

    Attributes:
        patience: offers without improvement that are enough; 0: none ever are.
        value: the highest so far; −∞ before the first offer.
        step: after how many steps it was reached.
        metrics: what else was measured then.
        weights: copies; empty before the first offer.
        stale: offers since.
    """

    patience: int = 0
    value: float = -math.inf
    step: int = 0
    metrics: dict[str, float] = field(default_factory=dict)
    weights: list[Tensor] = field(default_factory=list)
    stale: int = 0

    def offer(self, value: float, step: int, weights: Sequence[Tensor], metrics: dict[str, float]) -> None:
        """Keep copies of these weights if ``value`` is above all before; NaN never is."""
        if value > self.value:
            copies = [weight.detach().clone() for weight in weights]
            self.value, self.step, self.metrics, self.weights, self.stale = value, step, dict(metrics), copies, 0
        else:
            self.stale += 1

    @property
    def enough(self) -> bool:
        """Whether patience is at its end."""
        return 0 < self.patience <= self.stale

    def state_dict(self) -> dict[str, Any]:
        """Everything but the patience, which is a setting."""
        value = self.value if self.weights else None
        return {"value": value, "step": self.step, "metrics": self.metrics, "weights": self.weights,
                "stale": self.stale}  # fmt: skip

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Inverse of :meth:`state_dict`."""
        self.value = -math.inf if state["value"] is None else state["value"]
        self.step, self.stale = state["step"], state["stale"]
        self.metrics, self.weights = dict(state["metrics"]), list(state["weights"])
