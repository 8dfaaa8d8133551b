"""Are the subjects there, each in a place of its own, and itself? Pure functions on arrays of place scores.

``scores`` is (B, W, C): likeness of window w of picture b to candidate c (place.place_scores). Candidates are all
subjects of the protocol first and plain members of their classes after them. Definitions: joint success, identity,
leak matrix, bystanders.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from mole_diffusion.errors import InvalidRequest
from mole_diffusion.scoring.intervals import Interval, bootstrap_interval

Array = NDArray[np.floating]
Targets = Sequence[tuple[int, ...]]
MAX_OVERLAP = 0.5
_COMBINATIONS = 200_000


@dataclass(frozen=True)
class Found:
    """What was found in every picture.

    Attributes:
        places: per picture, the window of each of its subjects in the order of its targets; None where no choice of
            windows gives each a place of its own.
        identity: per picture, likeness of each subject's place to its own views; NaN without a place.
        success: (B,) whether every subject was found.
    """

    places: tuple[tuple[int, ...] | None, ...]
    identity: tuple[tuple[float, ...], ...]
    success: NDArray[np.bool_]


def find_subjects(
    scores: Array, targets: Targets, overlaps: Array, threshold: ArrayLike, *, max_overlap: float = MAX_OVERLAP
) -> Found:
    """Joint success: each subject in a place of its own, nearest to its own views of all candidates, above threshold.

    The places are those with the largest total likeness among all choices of windows that overlap by ``max_overlap``
    at most. A blank or blended picture cannot win: one place serves one subject, and it must look most like that one.

    Args:
        scores: (B, W, C).
        targets: the candidates that each picture should show.
        overlaps: (W, W) from ``place.overlap``.
        threshold: one for all candidates, or (C,); see ``calibrate_threshold``.
    """
    _check(scores, targets)
    limits = np.broadcast_to(np.asarray(threshold, float), scores.shape[2:])
    apart = np.asarray(overlaps) <= max_overlap
    places = tuple(_own_places(score, wanted, apart) for score, wanted in zip(scores, targets, strict=True))
    identity, success = [], []
    for score, wanted, place in zip(scores, targets, places, strict=True):
        own = [np.nan] * len(wanted) if place is None else [score[w, c] for w, c in zip(place, wanted, strict=True)]
        identity.append(tuple(float(value) for value in own))
        success.append(place is not None and _all_themselves(score, wanted, place, limits))
    return Found(places, tuple(identity), np.array(success, dtype=bool))


def _check(scores: Array, targets: Targets) -> None:
    if scores.ndim != 3 or len(scores) != len(targets):
        raise InvalidRequest(f"Expected scores (B, W, C) and B targets, got {scores.shape} and {len(targets)}.")


def _all_themselves(score: Array, wanted: Sequence[int], place: Sequence[int], limits: Array) -> bool:
    return all(score[w].argmax() == c and score[w, c] >= limits[c] for w, c in zip(place, wanted, strict=True))


def _own_places(score: Array, wanted: Sequence[int], apart: NDArray[np.bool_]) -> tuple[int, ...] | None:
    """Windows with the largest sum of likeness, pairwise apart; exhaustive over each subject's best windows."""
    kept = min(len(score), int(_COMBINATIONS ** (1 / len(wanted))))
    best = [np.argsort(-score[:, c], kind="stable")[:kept] for c in wanted]
    total = np.zeros((kept,) * len(wanted))
    for axis, (rows, c) in enumerate(zip(best, wanted, strict=True)):
        shape = [1] * len(wanted)
        shape[axis] = kept
        total = total + score[rows, c].reshape(shape)
        for other in range(axis):
            pair = np.where(apart[np.ix_(best[other], rows)], 0.0, -np.inf)
            shape = [1] * len(wanted)
            shape[other] = shape[axis] = kept
            total = total + pair.reshape(shape)
    choice = np.unravel_index(int(total.argmax()), total.shape)
    if total[choice] == -np.inf:
        return None
    return tuple(int(rows[index]) for rows, index in zip(best, choice, strict=True))


def leak_matrix(scores: Array, targets: Targets, subjects: int) -> Array:
    """(S, C): of the pictures that should show subject i, the share whose place nearest to i looks most like j.

    The diagonal is the share in which that place is i itself; columns from S on are the plain class members.
    Rows of subjects that no picture should show are NaN.
    """
    _check(scores, targets)
    counts = np.zeros((subjects, scores.shape[2]))
    for score, wanted in zip(scores, targets, strict=True):
        for c in wanted:
            counts[c, score[score[:, c].argmax()].argmax()] += 1
    shown = counts.sum(axis=1, keepdims=True)
    return np.divide(counts, shown, out=np.full_like(counts, np.nan), where=shown > 0)


def bystander_share(
    scores: Array, found: Found, bystanders: Sequence[int], subjects: int, overlaps: Array
) -> NDArray[np.bool_]:
    """(B,) whether the bystander of each picture looks like a subject.

    Args:
        bystanders: the plain class member that each picture should show beside its subjects.
        subjects: number of subjects S; candidates from S on are plain.

    The bystander's place is the window most like it that overlaps no subject's place by more than half.
    """
    taken = []
    for score, place, plain in zip(scores, found.places, bystanders, strict=True):
        free = np.ones(len(score), dtype=bool)
        for window in place or ():
            free &= np.asarray(overlaps)[window] <= MAX_OVERLAP
        allowed = np.where(free, score[:, plain], -np.inf)
        taken.append(bool(free.any()) and int(score[allowed.argmax()].argmax()) < subjects)
    return np.array(taken, dtype=bool)


@dataclass(frozen=True)
class SceneReport:
    """Scores of one method on one protocol.

    Attributes:
        label: the identity scorer that made them.
        names: the candidates, subjects first.
        joint: joint success with its interval over groups.
        identity: per subject, mean likeness of its place to its held-out views, with its interval.
        leak: (S, C), see ``leak_matrix``.
        success: per picture.
    """

    label: str
    names: tuple[str, ...]
    joint: Interval
    identity: dict[str, Interval]
    leak: Array
    success: tuple[bool, ...]


def report_scenes(
    scores: Array,
    targets: Targets,
    overlaps: Array,
    threshold: ArrayLike,
    *,
    names: Sequence[str],
    subjects: int,
    label: str,
    groups: Sequence[Hashable] | None = None,
    seed: int = 0,
) -> SceneReport:
    """Everything of the scores section in one record; ``groups`` defaults to each picture's set of subjects."""
    found = find_subjects(scores, targets, overlaps, threshold)
    of_group = list(groups) if groups is not None else [tuple(sorted(wanted)) for wanted in targets]
    return SceneReport(
        label=label,
        names=tuple(names),
        joint=bootstrap_interval(found.success.astype(float), of_group, seed=seed),
        identity=_identity_by_subject(found, targets, of_group, names, seed),
        leak=leak_matrix(scores, targets, subjects),
        success=tuple(bool(value) for value in found.success),
    )


def _identity_by_subject(
    found: Found, targets: Targets, groups: Sequence[Hashable], names: Sequence[str], seed: int
) -> dict[str, Interval]:
    values: dict[int, list[tuple[float, Hashable]]] = {}
    for own, wanted, group in zip(found.identity, targets, groups, strict=True):
        for value, c in zip(own, wanted, strict=True):
            if not np.isnan(value):
                values.setdefault(c, []).append((value, group))
    return {
        names[c]: bootstrap_interval([value for value, _ in pairs], [group for _, group in pairs], seed=seed)
        for c, pairs in sorted(values.items())
    }
