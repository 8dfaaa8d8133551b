"""Clocks and memory: paired rounds in one process, medians and quartiles, the memory that one contender takes."""

from __future__ import annotations

import ctypes
import gc
import random
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil
import torch

MIN_ROUNDS, MAX_ROUNDS = 3, 40


def seconds(call: Callable[[], Any], device: torch.device) -> float:
    """Wall time of one call, with the accelerator's queue empty before and after."""
    _finish(device)
    start = time.perf_counter()
    call()
    _finish(device)
    return time.perf_counter() - start


def paired(
    calls: Mapping[str, Callable[[], Any]],
    device: torch.device,
    *,
    rounds: int | None = None,
    budget_s: float = 25.0,
    seed: int = 0,
) -> dict[str, list[float]]:
    """Seconds per call, one number per round; every round runs all calls in a new order, so that drift hits all alike.

    Args:
        calls: what to time, by name.
        device: where it runs.
        rounds: how many rounds; None = as many as fit into the budget, between MIN_ROUNDS and MAX_ROUNDS.
        budget_s: seconds for all rounds together.
        seed: of the orders.
    """
    order, shuffle = list(calls), random.Random(seed).shuffle
    times: dict[str, list[float]] = {name: [] for name in calls}
    start = time.perf_counter()
    for done in range(rounds or MAX_ROUNDS):
        spent = time.perf_counter() - start
        if rounds is None and done >= MIN_ROUNDS and spent * (done + 1) / done > budget_s:
            break
        shuffle(order)
        for name in order:
            times[name].append(seconds(calls[name], device))
    return times


def quartiles(values: Sequence[float]) -> tuple[float, float]:
    """First and third quartile."""
    if len(values) < 2:
        return values[0], values[0]
    first, _, third = statistics.quantiles(values, n=4, method="inclusive")
    return first, third


class Memory:
    """Bytes that come on top of what the process held at the start.

    On an accelerator torch's allocator counts. On a processor it is the resident memory of the process, exact to some
    megabytes; its peak is known on Linux only.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        gc.collect()
        self._settle()
        self.start = self._now()

    def held(self) -> int:
        """More bytes than at the start."""
        _finish(self.device)
        return self._now() - self.start

    def peak(self, call: Callable[[], Any]) -> int | None:
        """Most bytes above the start while ``call`` runs; None where the system does not tell."""
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
            call()
            _finish(self.device)
            return torch.cuda.max_memory_allocated(self.device) - self.start
        self._settle()
        try:
            Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
        except OSError:
            return None
        call()
        lines = Path("/proc/self/status").read_text().splitlines()
        peak = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))
        return peak - self.start

    def _now(self) -> int:
        if self.device.type == "cuda":
            return torch.cuda.memory_allocated(self.device)
        return psutil.Process().memory_info().rss

    def _settle(self) -> None:
        """Free pages that the allocators keep for later would hide what is taken next."""
        _finish(self.device)
        if self.device.type == "cpu" and sys.platform == "linux":
            trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
            if trim is not None:
                trim(0)


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
