"""Intervals and thresholds: pure functions on arrays."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from mole_diffusion.errors import InvalidRequest


@dataclass(frozen=True)
class Interval:
    """A mean with its bootstrap interval; ``groups`` is the number of independent groups behind it."""

    mean: float
    low: float
    high: float
    groups: int

    def __str__(self) -> str:
        return f"{self.mean:.3f} [{self.low:.3f}, {self.high:.3f}]"


def bootstrap_interval(
    values: ArrayLike, groups: Sequence[Hashable], *, seed: int = 0, samples: int = 2000, level: float = 0.95
) -> Interval:
    """Mean of ``values`` with a percentile interval by resampling groups, not values.

    Pictures of one pair of subjects are alike, so a bootstrap over pictures would promise too much: whole pairs (or
    triples) are drawn with replacement and every pair counts the same.

    Args:
        values: (B,) one number per picture.
        groups: (B,) the pair or triple that each picture belongs to.
        seed: of the resampling; the same seed gives the same interval.
        samples: number of resamples.
        level: share of resamples inside the interval.
    """
    numbers = np.asarray(values, dtype=np.float64)
    if numbers.ndim != 1 or len(numbers) == 0 or len(numbers) != len(groups):
        raise InvalidRequest(f"Expected one group per value, got {numbers.shape} values and {len(groups)} groups.")
    means = _group_means(numbers, groups)
    drawn = np.random.default_rng(seed).integers(len(means), size=(samples, len(means)))
    low, high = np.quantile(means[drawn].mean(axis=1), [(1 - level) / 2, (1 + level) / 2])
    return Interval(float(means.mean()), float(low), float(high), len(means))


def _group_means(values: NDArray[np.float64], groups: Sequence[Hashable]) -> NDArray[np.float64]:
    members: dict[Hashable, list[float]] = {}
    for value, group in zip(values, groups, strict=True):
        members.setdefault(group, []).append(float(value))
    return np.array([np.mean(numbers) for numbers in members.values()], dtype=np.float64)


@dataclass(frozen=True)
class Calibration:
    """A threshold and what it costs on real scenes.

    Attributes:
        threshold: a place at or above it counts as the subject.
        hit_rate: share of scenes with the subject in which it is found.
        false_rate: share of scenes without the subject in which it is found nevertheless.
        auc: chance that a scene with the subject scores above one without it.
    """

    threshold: float
    hit_rate: float
    false_rate: float
    auc: float


def calibrate_threshold(present: ArrayLike, absent: ArrayLike) -> Calibration:
    """The threshold that separates scores of real scenes with (``present``) and without (``absent``) a subject best.

    Best = largest hit rate − false rate (Youden's J); between two scores the middle is taken.
    """
    hits, misses = np.sort(np.asarray(present, float)), np.sort(np.asarray(absent, float))
    if not len(hits) or not len(misses):
        raise InvalidRequest("A threshold needs scores of scenes with the subject and of scenes without it.")
    every = np.unique(np.concatenate([hits, misses]))
    candidates = np.concatenate([every[:1], (every[1:] + every[:-1]) / 2])
    hit_rates = 1 - np.searchsorted(hits, candidates) / len(hits)
    false_rates = 1 - np.searchsorted(misses, candidates) / len(misses)
    best = int((hit_rates - false_rates).argmax())
    return Calibration(
        float(candidates[best]), float(hit_rates[best]), float(false_rates[best]), area_under_curve(hits, misses)
    )


def area_under_curve(present: ArrayLike, absent: ArrayLike) -> float:
    """Chance that a value of ``present`` is larger than one of ``absent``; ties count half."""
    high, low = np.asarray(present, float), np.sort(np.asarray(absent, float))
    below, up_to = np.searchsorted(low, high, "left"), np.searchsorted(low, high, "right")
    return float((below + up_to).mean() / 2 / len(low))
