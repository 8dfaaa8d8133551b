"""The processes that train one task together, one per device: each takes its part of every batch.

Gradients are averaged over the processes; a batch of equal parts therefore trains as it would in one process. Only the
first process writes files and says events, and what it is told holds for all. Started alone, a process is all of them.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import TYPE_CHECKING

import torch

from training.config import check

if TYPE_CHECKING:
    from accelerate import Accelerator


class Ranks:
    """This process among those that train together; without an accelerator it is alone.

    Attributes:
        count: how many processes there are.
        index: which one this is, 0…count-1.
    """

    def __init__(self, accelerator: Accelerator | None = None) -> None:
        self._accelerator = accelerator
        self.count = 1 if accelerator is None else accelerator.num_processes
        self.index = 0 if accelerator is None else accelerator.process_index

    @classmethod
    def here(cls, device: str | None = None) -> Ranks:
        """By what a launcher (``accelerate launch``, torchrun) has put into the environment; may be asked again.

        Args:
            device: what the user asked for, default MOLE_DEVICE; "cpu" counts even where there are GPUs.
        """
        if int(os.environ.get("WORLD_SIZE", "1")) == 1:
            return cls()
        asked = device or os.environ.get("MOLE_DEVICE")
        return cls(_accelerator(asked == "cpu" or not torch.cuda.is_available()))

    @property
    def first(self) -> bool:
        """Whether this process writes and speaks for all."""
        return self.index == 0

    @property
    def device(self) -> str | None:
        """Where this process trains, for instance "cuda:1"; None: it is alone and free to choose."""
        if self._accelerator is None:
            return None
        device = self._accelerator.device
        return "cpu" if device.type == "cpu" else str(device)

    def part(self, batch: int) -> slice:
        """This process's rows of a batch. Raises InvalidRequest where the parts would differ in size."""
        check(
            batch % self.count == 0,
            f"A batch of {batch} cannot be shared evenly by {self.count} devices; choose a multiple of {self.count}.",
        )
        each = batch // self.count
        return slice(self.index * each, (self.index + 1) * each)

    def average(self, parameters: Iterable[torch.nn.Parameter]) -> None:
        """Replace every gradient by its mean over the processes, all in one message.

        A parameter that got no gradient in any process keeps none: optimisers skip it, as in one process.
        """
        if self._accelerator is None:
            return
        chosen = list(parameters)
        flat = [torch.zeros_like(p).flatten() if p.grad is None else p.grad.flatten() for p in chosen]
        marks = flat[0].new_tensor([parameter.grad is not None for parameter in chosen])
        sizes = [*(part.numel() for part in flat), len(marks)]
        *means, marked = self._mean(torch.cat([*flat, marks])).split(sizes)
        for parameter, mean, mark in zip(chosen, means, marked.tolist(), strict=True):
            parameter.grad = mean.view_as(parameter).to(parameter.dtype) if mark else None

    def mean(self, value: float) -> float:
        """The mean of a number over the processes."""
        if self._accelerator is None:
            return value
        return float(self._mean(torch.tensor([value], dtype=torch.float64, device=self._accelerator.device)))

    def agree(self, flags: Sequence[bool]) -> list[bool]:
        """What the first process says, for all of them; those of the others are not looked at, only counted."""
        if self._accelerator is None:
            return list(flags)
        from accelerate.utils import broadcast

        told = torch.tensor([float(flag) for flag in flags], device=self._accelerator.device)
        return [bool(flag) for flag in broadcast(told, from_process=0)]  # type: ignore[union-attr]

    @contextmanager
    def first_alone(self) -> Iterator[None]:
        """The first process goes through the block, then the others: they find what it has made."""
        if not self.first:
            self.wait()
        yield
        if self.first:
            self.wait()

    def wait(self) -> None:
        """Until all processes are here."""
        if self._accelerator is not None:
            self._accelerator.wait_for_everyone()

    def close(self) -> None:
        """Leave the others, at the end of a training that went well; a launcher ends those of one that failed."""
        if self._accelerator is not None:
            self._accelerator.end_training()

    def _mean(self, tensor: torch.Tensor) -> torch.Tensor:
        assert self._accelerator is not None
        return self._accelerator.reduce(tensor, "mean")  # type: ignore[return-value]


@cache
def _accelerator(cpu: bool) -> Accelerator:
    """One for the life of a process: after :meth:`Ranks.close` it still knows which one it is."""
    from accelerate import Accelerator

    return Accelerator(cpu=cpu)


ALONE = Ranks()
"""A process that trains by itself."""
