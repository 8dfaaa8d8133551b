"""The judge of the demo base: nearest neighbour on ImageNet features, fixed before the base is trained.

It shares nothing with the base: EfficientNet-Lite0 features of windows, compared with a gallery of the same
windows of *real* composed scenes. Floors and ceilings come from the same measure on real scenes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from mole_diffusion.scoring.identity import IdentityScorer
from training.base.scenes import BACKGROUNDS, compose_scene

_RENDERS = 12


def _window_boxes(left: float, width: float) -> list[tuple[float, float, float]]:
    """Square windows (x, y, side) in shares of the picture, inside the vertical strip [left, left + width]."""
    if width == 1:
        return [(0, 0, 1.0)] + [(x, y, 0.66) for y in (0, 0.17, 0.34) for x in (0, 0.17, 0.34)]
    return [(left, y, 0.5) for y in (0, 0.125, 0.25, 0.375, 0.5)]


@dataclass
class Judge:
    """Ranks names for a whole picture or for a half of it."""

    names: tuple[str, ...]
    scorer: IdentityScorer
    gallery: Tensor
    """(names, renders, features) of unit length."""
    mean: Tensor

    @classmethod
    def build(cls, things: Mapping[str, np.ndarray], scorer: IdentityScorer, size: int, seed: int = 20240) -> Judge:
        """Gallery from ``_RENDERS`` scenes per name, drawn with a seed that no training uses."""
        rng = np.random.default_rng(seed)
        crops = []
        for name in things:
            for _ in range(_RENDERS):
                scene = compose_scene(things, [name], str(rng.choice(BACKGROUNDS)), size, rng)
                x0, y0, x1, y1 = scene.things[0].box
                side = min(size, max(x1 - x0, y1 - y0) * rng.uniform(1.05, 1.3))
                left = np.clip((x0 + x1 - side) / 2, 0, size - side)
                top = np.clip((y0 + y1 - side) / 2, 0, size - side)
                crops.append(_crop(scene.image, left / size, top / size, side / size))
        features = _features(scorer, torch.stack(crops))
        mean = features.mean(0)
        gallery = F.normalize(features - mean, dim=-1).unflatten(0, (len(things), _RENDERS))
        return cls(tuple(things), scorer, gallery, mean)

    def rank(self, pictures: np.ndarray, strip: tuple[float, float] = (0.0, 1.0)) -> Tensor:
        """Names by falling similarity, (B, names) indices, for (B, H, W, 3) uint8 pictures seen through ``strip``."""
        boxes = _window_boxes(*strip)
        crops = torch.stack([_crop(picture, *box) for picture in pictures for box in boxes])
        features = F.normalize(_features(self.scorer, crops) - self.mean, dim=-1).unflatten(0, (-1, len(boxes)))
        similarity = torch.einsum("bwf,nrf->bwnr", features, self.gallery)
        # Mean of the three nearest renders, best window.
        return similarity.topk(3, -1).values.mean(-1).amax(1).argsort(-1, descending=True)

    def look(self, pictures: np.ndarray, things: int) -> tuple[Tensor, ...]:
        """Ranks of the whole picture for one thing, of its left and right half for two."""
        strips = ((0.0, 1.0),) if things == 1 else ((0.0, 0.5), (0.5, 0.5))
        return tuple(self.rank(pictures, strip) for strip in strips)

    def hits(self, ranks: tuple[Tensor, ...], names: Sequence[Sequence[str]], top: int) -> np.ndarray:
        """(B,) bool: in every strip its thing is among the ``top``; ``names`` holds one row of names per strip."""
        found = np.ones(len(ranks[0]), bool)
        for order, wanted in zip(ranks, names, strict=True):
            found &= (order[:, :top].numpy() == self._indices(wanted)[:, None]).any(1)
        return found

    def _indices(self, names: Sequence[str]) -> np.ndarray:
        return np.array([self.names.index(name) for name in names])


def _crop(picture: np.ndarray, x: float, y: float, side: float) -> Tensor:
    """(3, 96, 96) float in 0..1 of a square window given in shares of the picture."""
    size = picture.shape[0]
    x0, y0, extent = round(x * size), round(y * size), max(2, round(side * size))
    cut = torch.from_numpy(np.ascontiguousarray(picture[y0 : y0 + extent, x0 : x0 + extent]))
    cut = cut.permute(2, 0, 1)[None].float() / 255
    return F.interpolate(cut, size=(96, 96), mode="bilinear", antialias=True)[0]


def _features(scorer: IdentityScorer, crops: Tensor) -> Tensor:
    return torch.cat([scorer.embed(batch) for batch in crops.split(256)])
