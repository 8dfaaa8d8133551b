"""The processes that train one task together, one per device: each takes its part of every batch.

Gradients are averaged over the processes; a batch of equal parts therefore trains as it would in one process. Only the
first process writes files and says events, and what it is told holds for all. Started alone, a process is all of them.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import torch

from training.config import check

if TYPE_CHECKING:
    from accelerate import Accelerator


class Ranks:
    """This process among those that train together; without an accelerator it is alone."""

    def __init__(self, accelerator: Accelerator | None = None) -> None:
        self._accelerator = accelerator
        self.count = 1 if accelerator is None else accelerator.num_processes
        self.index = 0 if accelerator is None else accelerator.process_index

    @classmethod
    def here(cls) -> Ranks:
        """By what a launcher (accelerate, torchrun) has put into the environment."""
        if int(os.environ.get("WORLD_SIZE", "1")) == 1:
            return cls()
        from accelerate import Accelerator

        return cls(Accelerator(cpu=not torch.cuda.is_available()))

    @property
    def first(self) -> bool:
        """Whether this process writes and speaks for all."""
        return self.index == 0

    def part(self, batch: int) -> slice:
        """This process's rows of a batch. Raises InvalidRequest where the parts would differ in size."""
        check(
            batch % self.count == 0,
            f"A batch of {batch} cannot be shared evenly by {self.count} devices; choose a multiple of {self.count}.",
        )
        each = batch // self.count
        return slice(self.index * each, (self.index + 1) * each)

    def average(self, parameters: Iterable[torch.nn.Parameter]) -> None:
        """Replace every gradient by its mean over the processes."""
        if self._accelerator is None:
            return
        for parameter in parameters:
            gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            parameter.grad = self._accelerator.reduce(gradient, "mean")  # type: ignore[assignment]

    def mean(self, value: float) -> float:
        """The mean of a number over the processes."""
        if self._accelerator is None:
            return value
        tensor = torch.tensor(value, dtype=torch.float64, device=self._accelerator.device)
        return float(self._accelerator.reduce(tensor, "mean"))  # type: ignore[arg-type]

    def agree(self, flags: Sequence[bool]) -> list[bool]:
        """What the first process says, for all of them."""
        if self._accelerator is None:
            return list(flags)
        from accelerate.utils import broadcast

        told = torch.tensor([float(flag) for flag in flags], device=self._accelerator.device)
        return [bool(flag) for flag in broadcast(told, from_process=0)]  # type: ignore[union-attr]

    def wait(self) -> None:
        """Until all processes are here."""
        if self._accelerator is not None:
            self._accelerator.wait_for_everyone()
