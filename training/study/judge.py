"""Is a drawn subject itself? The study's judge of scenes of one or two demo subjects.

Like is compared with like: held-out views at the size at which subjects stand in a scene, and through the base's own
autoencoder. Against sharp, large views real scenes are found in 78 % of cases before that autoencoder and in none after
it (LOG.md), so that no method could have won. Thresholds come from real scenes of the training views, never from what a
method drew; ceilings from other such scenes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from mole_diffusion.bases import Base
from mole_diffusion.scoring.identity import CentredIdentity, EfficientNetIdentity, IdentityScorer
from mole_diffusion.scoring.intervals import calibrate_threshold
from mole_diffusion.scoring.place import overlap, place_scores, windows
from mole_diffusion.scoring.report import Found, find_subjects
from mole_diffusion.scoring.views import Gallery
from training.base.scenes import COLOURS, EXTENTS, paint_background, paste, slots, snap
from training.data.paste import to_tensor

FRAME = 1.16
"""A framed view is so much wider than the subject in it (views.frame)."""


class SubjectJudge:
    """EfficientNet-Lite0's opinion, centred, of where the subjects are in scenes of ``count`` of them.

    Attributes:
        names: all subjects, in the order of the last axis of scores.
        thresholds: (C,) what a place must reach to count as its subject.
        success: share of real scenes, as the base can show them, in which all subjects are found.
        successes: (C,) the same of the scenes that show a subject.
        ceilings: (C,) likeness that a subject reaches in those.

    Args:
        views: cut-outs (4, h, w) by subject that pictures are compared with.
        posed: other cut-outs of the same subjects, that real scenes are composed of.
        count: subjects in a scene.
        each: real scenes per subject, for thresholds and again for ceilings.
    """

    def __init__(
        self, base: Base, pipe: Any, views: Mapping[str, Sequence[Tensor]], posed: Mapping[str, Sequence[Tensor]],
        count: int, each: int = 20,
    ) -> None:  # fmt: skip
        self._base, self._pipe, self._count, self._each = base, pipe, count, each
        self.names, size = tuple(views), base.resolution
        side = EXTENTS[count] * FRAME
        self.boxes = windows(size, size, scales=(side, min(1.0, 1.2 * side)))
        self.overlaps = overlap(self.boxes).numpy()
        cutouts = [list(posed[name]) for name in views]
        pictures, shown = self._real_scenes(cutouts, seed=11)
        self.identity: IdentityScorer = CentredIdentity.fit(EfficientNetIdentity(size=128), pictures)
        self.gallery = Gallery.build(views, self.identity, show=self._in_place)
        self.thresholds = _thresholds(self.scores(pictures).max(1), _there(shown, len(cutouts)))
        pictures, shown = self._real_scenes(cutouts, seed=12)
        scores, there = self.scores(pictures), _there(shown, len(cutouts))
        found = self.find(scores, shown).success
        self.success, self.successes = float(found.mean()), np.array([found[column].mean() for column in there.T])
        self.ceilings = np.array([scores.max(1)[there[:, c], c].mean() for c in range(len(cutouts))])

    @property
    def label(self) -> str:
        """Says which model judges and what it compares."""
        return f"{self.identity.label}, views through the base's autoencoder"

    def as_base(self, pictures: Tensor) -> Tensor:
        """Pictures (B, 3, H, W) in 0…1 through the base's autoencoder: the best that it could draw."""
        with torch.no_grad():
            parts = [self._base.decode(self._pipe, self._base.to_latents(self._pipe, p)) for p in pictures.split(32)]
        return torch.cat(parts).cpu()

    def scores(self, pictures: Tensor) -> np.ndarray:
        """(B, windows, subjects) likeness."""
        return place_scores(pictures, self.gallery, self.identity, self.boxes).numpy()

    def find(self, scores: np.ndarray, targets: Sequence[tuple[int, ...]]) -> Found:
        """Every subject in a place of its own, most like itself of all, above its threshold."""
        return find_subjects(scores, targets, self.overlaps, self.thresholds)

    def _in_place(self, framed: Tensor) -> Tensor:
        """Framed views on their ground, (N, 3, S, S), as a scene of the base shows them."""
        size, side = self._base.resolution, 4 * round(self._base.resolution * EXTENTS[self._count] * FRAME / 4)
        edge = (size - side) // 2
        small = F.interpolate(framed, (side, side), mode="bilinear", antialias=True)
        scene = self.as_base(F.pad(small, (edge,) * 4, mode="replicate"))
        cut = scene[..., edge : edge + side, edge : edge + side]
        return F.interpolate(cut, framed.shape[-2:], mode="bicubic", antialias=True).clamp(0, 1)

    def _real_scenes(self, cutouts: Sequence[Sequence[Tensor]], seed: int) -> tuple[Tensor, list[tuple[int, ...]]]:
        """Composed scenes as the base can show them, and which subjects stand in them from left to right."""
        rng, size, subjects = np.random.default_rng(seed), self._base.resolution, len(cutouts)
        made, shown = [], []
        for index in range(self._each * subjects // self._count):
            others = rng.permutation(np.delete(np.arange(subjects), index % subjects))[: self._count - 1]
            numbers = rng.permutation([index % subjects, *others])
            picture = paint_background(str(rng.choice(list(COLOURS))), size, rng)
            for (x, y, extent), number in zip(slots(self._count), numbers, strict=True):
                view = cutouts[number][int(rng.integers(len(cutouts[number])))]
                cutout = (view.permute(1, 2, 0).numpy() * 255).astype(np.uint8)
                where = (size * snap(x, size), size * snap(y, size))
                picture, _ = paste(picture, cutout, size * extent, where, rng, flip=False, rotate=0)
            made.append(to_tensor(Image.fromarray(np.clip(picture, 0, 255).astype(np.uint8))))
            shown.append(tuple(int(number) for number in numbers))
        return self.as_base(torch.stack(made)), shown


def _there(shown: Sequence[tuple[int, ...]], subjects: int) -> np.ndarray:
    """(B, C) whether a scene shows a subject."""
    there = np.zeros((len(shown), subjects), bool)
    for row, numbers in enumerate(shown):
        there[row, list(numbers)] = True
    return there


def _thresholds(best: np.ndarray, there: np.ndarray) -> np.ndarray:
    """(C,) from the best likeness (B, C) in real scenes, at most the tenth percentile of those that show the subject.

    A drawing may be a poor view, but not another subject.
    """
    limits = []
    for values, own in zip(best.T, there.T, strict=True):
        calibrated = calibrate_threshold(values[own], values[~own]).threshold
        limits.append(min(calibrated, float(np.quantile(values[own], 0.1))))
    return np.array(limits)
