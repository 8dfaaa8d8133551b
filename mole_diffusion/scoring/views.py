"""Views of a subject: cut-outs with alpha, framed alike and laid on plain backgrounds, as a crop shows them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from mole_diffusion.errors import InvalidFile, InvalidRequest
from mole_diffusion.scoring.identity import IdentityScorer

_GREYS = (0.1, 0.5, 0.9)
_PURE = ((0.8, 0.3, 0.3), (0.3, 0.7, 0.35), (0.35, 0.5, 0.9), (0.9, 0.8, 0.35), (0.6, 0.4, 0.7))
PALETTE: tuple[tuple[float, float, float], ...] = (*((grey, grey, grey) for grey in _GREYS), *_PURE)
"""Background colours that views are laid on; the one nearest to a picture's border stands in for it."""


def load_views(folder: Path) -> list[Tensor]:
    """Every PNG of a folder, in order of name, as (4, H, W) in 0…1; a picture without alpha counts as all subject.

    Raises:
        InvalidRequest: the folder has no PNG.
        InvalidFile: one of them is no picture.
    """
    paths = sorted(folder.glob("*.png"))
    if not paths:
        raise InvalidRequest(f"Expected pictures of a subject (PNG) in {folder}, found none.")
    return [_load(path) for path in paths]


def _load(path: Path) -> Tensor:
    try:
        with Image.open(path, formats=["PNG"]) as picture:
            pixels = np.asarray(picture.convert("RGBA"), dtype=np.float32) / 255
    except (OSError, Image.DecompressionBombError, SyntaxError) as error:
        raise InvalidFile(f"{path.name} is not a readable PNG: {error}.") from error
    return torch.from_numpy(pixels).permute(2, 0, 1)


def frame(view: Tensor, size: int, *, margin: float = 0.08) -> Tensor:
    """A view (4, H, W) cut to its alpha, centred in a square with ``margin`` on every side: (4, size, size)."""
    rows, columns = (torch.nonzero(view[3].amax(dim=axis) > 0.05).flatten() for axis in (1, 0))
    if len(rows) == 0:
        raise InvalidFile("A view of a subject is empty: its alpha is zero everywhere.")
    cut = view[:, rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    height, width = cut.shape[1:]
    side = max(height, width) + 2 * round(max(height, width) * margin)
    left, top = (side - width) // 2, (side - height) // 2
    # Colour is meaningless where alpha is 0: premultiply, so that resizing does not draw it in.
    premultiplied = torch.cat([cut[:3] * cut[3:], cut[3:]])
    padded = F.pad(premultiplied, (left, side - width - left, top, side - height - top))
    return F.interpolate(padded[None], (size, size), mode="bilinear", antialias=True)[0]


def on_background(framed: Tensor, colours: Tensor) -> Tensor:
    """Premultiplied views (V, 4, S, S) on every colour (P, 3): pictures (P, V, 3, S, S) in 0…1."""
    paint = colours.view(-1, 1, 3, 1, 1)
    return (framed[None, :, :3] + (1 - framed[None, :, 3:]) * paint).clamp(0, 1)


def border_colours(images: Tensor) -> Tensor:
    """Median colour of the outermost pixels of pictures (B, 3, H, W): (B, 3)."""
    ring = [images[:, :, 0], images[:, :, -1], images[:, :, :, 0], images[:, :, :, -1]]
    return torch.cat(ring, dim=-1).float().median(dim=-1).values


@dataclass(frozen=True)
class Gallery:
    """Features of the views of all candidates: the subjects of a protocol and plain members of their classes.

    Attributes:
        names: C candidates.
        features: per candidate (P, V, D) unit vectors: V views on P background colours.
        palette: (P, 3) those colours.
        reduce: a place is as like a candidate as the ``mean`` of its views, or as its nearest view (``max``).
        label: the identity scorer's.
    """

    names: tuple[str, ...]
    features: tuple[Tensor, ...]
    palette: Tensor
    reduce: Literal["mean", "max"]
    label: str

    @classmethod
    def build(
        cls,
        views: Mapping[str, Sequence[Tensor]],
        scorer: IdentityScorer,
        *,
        palette: Sequence[tuple[float, float, float]] = PALETTE,
        reduce: Literal["mean", "max"] = "mean",
        show: Callable[[Tensor], Tensor] | None = None,
    ) -> Gallery:
        """Embeds the views (4, H, W) of every candidate on every background.

        ``show`` makes of framed views on their grounds, (N, 3, S, S), what the pictures to be scored would show of
        them: a small, soft drawing is far from the sharp view of its own subject (training/study/judge.py).
        """
        if not views:
            raise InvalidRequest("Expected the views of one subject at least, got none.")
        colours = torch.tensor(palette)
        features = tuple(_features(pictures, colours, scorer, show) for pictures in views.values())
        return cls(tuple(views), features, colours, reduce, scorer.label)

    def similarity(self, places: Tensor, borders: Tensor) -> Tensor:
        """Likeness (B, W, C) of places (B, W, D) in pictures whose border colours are (B, 3)."""
        nearest = torch.cdist(borders, self.palette).argmin(dim=1)
        columns = []
        for features in self.features:
            cosines = torch.einsum("bwd,bvd->bwv", places, features[nearest])
            columns.append(cosines.mean(dim=2) if self.reduce == "mean" else cosines.amax(dim=2))
        return torch.stack(columns, dim=2)


def _features(
    views: Sequence[Tensor], colours: Tensor, scorer: IdentityScorer, show: Callable[[Tensor], Tensor] | None
) -> Tensor:
    framed = torch.stack([frame(view, scorer.size) for view in views])
    pictures = on_background(framed, colours).flatten(0, 1)
    return scorer.embed(pictures if show is None else show(pictures)).view(len(colours), len(views), -1)
