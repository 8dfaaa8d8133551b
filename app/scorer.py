"""Scores of pictures, each with the name of the model that made it."""

from __future__ import annotations

import logging
from collections.abc import Sequence
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
    """How much the best place in a picture looks like a subject.

    Attributes:
        score: cosine similarity to the subject's views.
        box: left, top, right, bottom of that place as fractions of the picture.
    """

    score: float
    box: tuple[float, float, float, float]


class Scorer:
    """Loads image-text models lazily and keeps the last one."""

    def __init__(self) -> None:
        self._loaded: tuple[str, Any] | None = None

    def alignment(self, base: Base, device: Any) -> Any:
        """The alignment scorer of a base."""
        from mole_diffusion.scoring import load_alignment

        if self._loaded is None or self._loaded[0] != base.alignment_model:
            self._loaded = (base.alignment_model, load_alignment(base, device))
        return self._loaded[1]

    def identity_label(self, alignment: Any) -> str:
        """The name of the identity model that goes with an alignment scorer."""
        return self._identity_of(alignment).label

    def identity(self, image: Image.Image, subjects: Sequence[Subject], alignment: Any) -> dict[str, Identity]:
        """Identity of every subject that has views, keyed by its name."""
        scorer = self._identity_of(alignment)
        return {subject.name: _best_place(image, subject, scorer) for subject in subjects if subject.views}

    def _identity_of(self, alignment: Any) -> Any:
        from mole_diffusion.scoring import ClipIdentity

        return ClipIdentity(alignment)


def _best_place(image: Image.Image, subject: Subject, scorer: Any) -> Identity:
    from mole_diffusion.scoring import subject_score

    views = [_tensor(open_view(path).convert("RGBA")) for path in subject.views]
    score, (left, top, right, bottom) = subject_score(_tensor(image.convert("RGB")), views, scorer)
    width, height = image.size
    return Identity(score, (left / width, top / height, right / width, bottom / height))


def _tensor(picture: Image.Image) -> Tensor:
    """(C, H, W) in 0…1."""
    import numpy as np
    import torch

    return torch.from_numpy(np.asarray(picture, dtype=np.float32) / 255).permute(2, 0, 1)
