"""Which experts are on: flags for shortcuts, and the same as tensors, so that compiled graphs see numbers."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class Switches:
    """One switch per column: the N gated experts, then those outside the gate.

    A compiled graph reads the tensors alone, whose addresses never change; so no switch makes it stale.
    """

    def __init__(self, gated: int, outside: int) -> None:
        self.gated = gated
        self.flags = [True] * (gated + outside)
        self._tensors: dict[torch.device, Tensor] = {}

    def set(self, column: int, on: bool) -> None:
        """Switch one column."""
        self.flags[column] = on
        for tensor in self._tensors.values():
            tensor[column] = on

    def any_of(self, columns: Sequence[int]) -> bool:
        """Is one of these columns on? Inside a compiled graph always, which costs a product with zeros."""
        return torch.compiler.is_compiling() or any(self.flags[column] for column in columns)

    @property
    def any(self) -> bool:
        """Is anything on?"""
        return torch.compiler.is_compiling() or any(self.flags)

    def prepare(self, device: torch.device) -> None:
        """Have the tensor of a device ready before a graph is compiled."""
        if device not in self._tensors:
            with torch.inference_mode(False):  # a switch is written outside too
                self._tensors[device] = torch.tensor(self.flags, device=device)

    def all(self, device: torch.device) -> Tensor:
        """(columns,) bool."""
        self.prepare(device)
        return self._tensors[device]

    def mask(self, device: torch.device) -> Tensor:
        """(N,) bool over the gated experts."""
        return self.all(device)[: self.gated]
