"""Is a drawn subject itself? The study's judge of scenes of one or two demo subjects.

Like is compared with like: held-out views at the size at which subjects stand in a scene, and through the base's own
autoencoder, which nothing drawn can beat. Against sharp, large views the same real scenes are found in 78 % of cases
before that autoencoder and in none after it (LOG.md), so that no method could have won. Thresholds and ceilings
come from real scenes alone, never from what a method drew.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from mole_diffusion.bases import Base
from mole_diffusion.scoring.identity import CentredIdentity, EfficientNetIdentity, IdentityScorer
from mole_diffusion.scoring.intervals import calibrate_threshold
from mole_diffusion.scoring.place import overlap, place_scores, windows
from mole_diffusion.scoring.report import Found, find_subjects
from mole_diffusion.scoring.views import Gallery
from training.base.scenes import COLOURS, EXTENTS, paint_background, paste, slots, snap

FRAME = 1.16
"""A framed view is so much wider than the subject in it (views.frame)."""
_SCENES = 60


class SubjectJudge:
    """EfficientNet-Lite0's opinion, centred, of where the subjects are in scenes of ``count`` of them.

    Attributes:
        names: all subjects, in the order of the last axis of scores.
        thresholds: (C,) what a place must reach to count as its subject.
        success: share of real scenes, as the base can show them, in which all subjects are found.
        ceilings: (C,) likeness that a subject reaches in those.
    """

    def __init__(self, base: Base, pipe: Any, views: Mapping[str, Sequence[Tensor]], count: int) -> None:
        self._base, self._pipe, self._count = base, pipe, count
        self.names, size = tuple(views), base.resolution
        side = EXTENTS[count] * FRAME
        self.boxes = windows(size, size, scales=(side, min(1.0, 1.2 * side)))
        self.overlaps = overlap(self.boxes).numpy()
        scenes, self._shown = self._real_scenes([list(v) for v in views.values()])
        shown = self.as_base(scenes)
        plain = EfficientNetIdentity(size=128)
        self.identity: IdentityScorer = CentredIdentity.fit(plain, shown)
        self.gallery = Gallery.build(views, self.identity, show=self._in_place)
        scores = self.scores(shown)
        self.thresholds, self.ceilings = self._calibrate(scores.max(1))
        self.success = float(self.find(scores, self._shown).success.mean())

    @property
    def label(self) -> str:
        """Says which model judges and what it compares."""
        return f"{self.identity.label}, views through the base's autoencoder"

    def as_base(self, pictures: Tensor) -> Tensor:
        """Pictures (B, 3, H, W) in 0…1 through the base's autoencoder: the best that it could draw."""
        with torch.no_grad():
            parts = [self._base.decode(self._pipe, self._base.to_latents(self._pipe, p)) for p in pictures.split(32)]
        return torch.cat(parts).clamp(0, 1).cpu()

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

    def _real_scenes(self, views: Sequence[Sequence[Tensor]]) -> tuple[Tensor, list[tuple[int, ...]]]:
        """Composed scenes of held-out views, and which subjects stand in them from left to right."""
        rng, size = np.random.default_rng(11), self._base.resolution
        made, shown = [], []
        for index in range(_SCENES):
            subjects = rng.choice(len(views), self._count, replace=False)
            picture = paint_background(str(rng.choice(list(COLOURS))), size, rng)
            for slot, number in zip(slots(self._count), subjects, strict=True):
                view = views[number][index % len(views[number])]
                cutout = (view.permute(1, 2, 0).numpy() * 255).astype(np.uint8)
                x, y, extent = slot
                where = (size * snap(x, size), size * snap(y, size))
                picture, _ = paste(picture, cutout, size * extent, where, rng, flip=False, rotate=0)
            made.append(to_tensor(np.clip(picture, 0, 255).astype(np.uint8)))
            shown.append(tuple(int(number) for number in subjects))
        return torch.stack(made), shown

    def _calibrate(self, best: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Thresholds and mean likeness (C,) from the best likeness (B, C) in real scenes."""
        there = np.zeros(best.shape, bool)
        for row, subjects in enumerate(self._shown):
            there[row, list(subjects)] = True
        columns = range(len(self.names))
        present = [best[there[:, c], c] for c in columns]
        # At most the tenth percentile of real subjects: a drawing may be a poor view, but not another subject.
        limits = [
            min(calibrate_threshold(present[c], best[~there[:, c], c]).threshold, float(np.quantile(present[c], 0.1)))
            for c in columns
        ]
        return np.array(limits), np.array([values.mean() for values in present])


def to_tensor(picture: np.ndarray) -> Tensor:
    """(H, W, 3) uint8 -> (3, H, W) in 0…1."""
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1).float() / 255
