"""Scores of pictures, each with the name of the model that made it."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from app.pictures import open_view
from app.plan import Subject

if TYPE_CHECKING:
    from PIL import Image
    from torch import Tensor

    from mole_diffusion.bases.base import Base

__all__ = ["Identity", "Scorer"]

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Identity:
    """How much a subject's place in a picture looks like it.

    Attributes:
        score: cosine similarity to the subject's views.
        box: left, top, right, bottom of that place as fractions of the picture.
    """

    score: float
    box: tuple[float, float, float, float]


class Scorer:
    """Loads image-text models lazily and keeps the last one.

    Args:
        load: gives the model of a base on a device; None = the base's own.
    """

    def __init__(self, load: Callable[[Base, Any], Any] | None = None) -> None:
        self._load = load
        self._loaded: tuple[str, Any] | None = None

    def alignment(self, base: Base, device: Any) -> Any:
        """The alignment scorer of a base. Raises MoleError with a sentence where it cannot be loaded."""
        from mole_diffusion.scoring import load_alignment

        if self._loaded is None or self._loaded[0] != base.alignment_model:
            self._loaded = (base.alignment_model, (self._load or load_alignment)(base, device))
        return self._loaded[1]

    def identity_label(self, alignment: Any) -> str:
        """The name of the identity model that goes with an alignment scorer."""
        return self._identity_of(alignment).label

    def identity(self, image: Image.Image, subjects: Sequence[Subject], alignment: Any) -> dict[str, Identity]:
        """Identity of every subject that has views, keyed by its name, each in a place of its own.

        One place serves one subject, so that a picture of a blend does not score for both.
        """
        seen = [subject for subject in subjects if subject.views]
        return _own_places(image, seen, self._identity_of(alignment)) if seen else {}

    def _identity_of(self, alignment: Any) -> Any:
        from mole_diffusion.scoring import ClipIdentity

        return ClipIdentity(alignment)


def _own_places(image: Image.Image, subjects: Sequence[Subject], scorer: Any) -> dict[str, Identity]:
    from mole_diffusion.scoring import Gallery, find_subjects, overlap, place_scores, windows

    width, height = image.size
    views = {subject.name: [_tensor(open_view(path).convert("RGBA")) for path in subject.views] for subject in subjects}
    boxes = windows(height, width)
    scores = place_scores(_tensor(image.convert("RGB"))[None], Gallery.build(views, scorer), scorer, boxes).numpy()
    everybody = [tuple(range(len(subjects)))]
    found = find_subjects(scores, everybody, overlap(boxes).numpy(), threshold=-1.0)
    places = found.places[0] or tuple(int(column.argmax()) for column in scores[0].T)
    sides = (width, height, width, height)
    return {
        subject.name: Identity(
            float(scores[0, place, column]),
            tuple(float(value) / side for value, side in zip(boxes[place], sides, strict=True)),  # type: ignore[arg-type]
        )
        for column, (subject, place) in enumerate(zip(subjects, places, strict=True))
    }


def _tensor(picture: Image.Image) -> Tensor:
    """(C, H, W) in 0…1."""
    import numpy as np
    import torch

    return torch.from_numpy(np.asarray(picture, dtype=np.float32) / 255).permute(2, 0, 1)
