"""Weights that follow the steps and look at nothing else."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor, nn

from mole_diffusion.functional import renormalise
from mole_diffusion.gates.config import ScheduledWeights, StaticWeights
from mole_diffusion.gates.protocol import BlockSpec, Looks, Run, Sight, Total
from mole_diffusion.gates.static import StaticGate


class Schedule(Protocol):
    """Says the weights of all places at once; implementations are ``nn.Module``.

    Attributes:
        total: as in :class:`mole_diffusion.gates.Gate`.
    """

    total: Total

    def at(self, run: Run) -> Tensor:
        """Weights in one step, (M or 1, rows or 1, 1, N) for M places, fp32; masked experts get 0."""
        ...

    def once(self, mask: Tensor) -> Tensor:
        """The same for text encoders, which run once, before the first step."""
        ...


class ScheduleGate(nn.Module):
    """A gate that asks its schedule once per step."""

    looks: Looks = "nothing"
    needs_spans = False
    pools = False
    guidance_rows = "own"

    def __init__(self, blocks: Sequence[BlockSpec], schedule: Schedule) -> None:
        super().__init__()
        self.schedule = schedule
        self.total: Total = schedule.total
        self.places = {block.name: place for place, block in enumerate(blocks)}
        self._step: tuple[Run, Tensor] | None = None

    def image(self, block: BlockSpec, sight: Sight | None, run: Run) -> Tensor:
        """(rows or 1, 1, N)."""
        if self._step is None or self._step[0] is not run:
            self._step = run, self.schedule.at(run)
        return self._of(block, self._step[1])

    def text(self, block: BlockSpec, sight: Sight, run: Run) -> Tensor | None:
        """As the rest of the place."""
        return None

    def network(self, block: BlockSpec, run: Run) -> Tensor:
        """(rows or 1, 1, N)."""
        return self.image(block, None, run)

    def encoder(self, block: BlockSpec, run: Run) -> Tensor:
        """(1, 1, N)."""
        return self._of(block, self.schedule.once(run.mask))

    def gain(self, block: BlockSpec, text: bool) -> Tensor | None:
        """None."""
        return None

    def static(self, block: BlockSpec, mask: Tensor) -> Tensor | None:
        """Every step has its own."""
        return None

    def _of(self, block: BlockSpec, weights: Tensor) -> Tensor:
        return weights[self.places[block.name] if weights.shape[0] > 1 else 0]


class Keyframes(nn.Module):
    """See :class:`mole_diffusion.gates.ScheduledWeights`.

    Attributes:
        times: (K,) rising progress.
        table: (K, M, N).
    """

    times: Tensor
    table: Tensor

    def __init__(self, blocks: Sequence[BlockSpec], experts: int, config: ScheduledWeights) -> None:
        super().__init__()
        self.config = config
        self.total: Total = "share" if config.redistribute else "free"
        rows = [StaticGate(blocks, experts, StaticWeights(weights)).table for _, weights in config.keyframes]
        self.register_buffer("times", torch.tensor([float(time) for time, _ in config.keyframes]))
        self.register_buffer("table", torch.stack([row.detach() for row in rows]))

    def at(self, run: Run) -> Tensor:
        """(M, rows or 1, 1, N)."""
        return self._masked(keyframed(self.times, self.table, progress(run), self.config.interpolate), run.mask)

    def once(self, mask: Tensor) -> Tensor:
        """The mean over the progress from 0 to 1, (M, 1, 1, N)."""
        return self._masked(average(self.times, self.table, self.config.interpolate).unsqueeze(0), mask)

    def _masked(self, weights: Tensor, mask: Tensor) -> Tensor:
        weights = weights.transpose(0, 1).unsqueeze(2)
        return renormalise(weights, mask) if self.config.redistribute else weights * mask.to(weights.dtype)


def progress(run: Run) -> Tensor:
    """0 at pure noise … 1 at the picture, (1,) or (rows,) fp32 without waiting for the accelerator; 0 without times."""
    if run.times is None:
        return torch.zeros(1, device=run.mask.device)
    times = run.times[:1] if run.times.stride(0) == 0 else run.times  # one timestep, expanded to all rows
    return (run.horizon - times.float()) / run.horizon


def keyframed(times: Tensor, table: Tensor, now: Tensor, interpolate: str) -> Tensor:
    """Values of a table at given moments.

    Args:
        times: (K,) rising.
        table: (K, …).
        now: (P,).
        interpolate: "hold" or "linear"; outside the first and last time always "hold".

    Returns:
        (P, …).
    """
    last = (torch.searchsorted(times, now, right=True) - 1).clamp_min(0)
    if interpolate == "hold":
        return table[last]
    following = (last + 1).clamp_max(len(times) - 1)
    gap = (times[following] - times[last]).clamp_min(torch.finfo(times.dtype).tiny)
    share = ((now - times[last]) / gap).clamp(0.0, 1.0).reshape(-1, *[1] * (table.ndim - 1))
    return torch.lerp(table[last], table[following], share)


def average(times: Tensor, table: Tensor, interpolate: str) -> Tensor:
    """The mean of :func:`keyframed` from 0 to 1, (…) like one entry of the table."""
    edges = torch.cat([times.new_zeros(1), times, times.new_ones(1)])
    held = torch.cat([table[:1], table])
    ends = torch.cat([table, table[-1:]]) if interpolate == "linear" else held
    return torch.tensordot(edges.diff(), (held + ends) / 2, dims=1)
