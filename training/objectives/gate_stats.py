"""What gates do with their experts: how decided they are, and who gets how much. Pure functions on traces."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from mole_diffusion.trace import Trace


def gate_stats(traces: Sequence[Trace]) -> dict[str, float]:
    """``gate_entropy`` and ``mass_<name>`` of every expert, over all blocks and steps of the traces.

    The entropy is that of each block's mean gate, as a share of NLA's: 1 = all experts alike, 0 = one of them alone.
    Masses are shares of the total weight: 1/N each is NLA.
    """
    rows = [row for trace in traces for steps in trace.weights.values() for row in steps]
    if not rows:
        return {}
    names = traces[0].names
    weights = np.asarray(rows, np.float64).clip(min=0)
    shares = weights / weights.sum(1, keepdims=True).clip(min=1e-12)
    entropy = -(shares * np.log(shares.clip(min=1e-12))).sum(1).mean()
    masses = {f"mass_{name}": float(value) for name, value in zip(names, shares.mean(0), strict=True)}
    return {"gate_entropy": float(entropy / math.log(len(names))) if len(names) > 1 else 0.0, **masses}
