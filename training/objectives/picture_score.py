"""How good are gates: the score of a few pictures made with them, by models that did not train them.

score = alignment × identity, the mean over pictures. Identity is the likeness of each named subject's place to its own
pictures, in places apart, 0 without one. Alignment is the cosine of picture and prompt; where no image-text model is
left to judge, the share of the named subjects whose place looks more like them than like the others stands in for it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from mole_diffusion.bases import Base
from mole_diffusion.errors import InvalidRequest
from mole_diffusion.scoring import CentredIdentity, Gallery, find_subjects, overlap, place_scores, windows
from mole_diffusion.scoring.place import crops
from training.base.scenes import article, background_phrase
from training.data.paste import to_tensor
from training.data.subjects import Subject
from training.rng import preserved_rng
from training.validation import Scorers

from .collage import CollageConfig, make_pool, subject_cutouts
from .views import as_tensor

if TYPE_CHECKING:
    from mole_diffusion import Composition
    from mole_diffusion.trace import Trace

DRAWN = ("forest", "orange", "desert", "purple", "sea", "brown", "pink", "gray")
"""Grounds of the demo world that neither its study nor the sample pictures use."""
REAL = (
    "in a kitchen", "in a city street", "on a wooden table", "in a garden", "on a sofa", "in the rain",
    "in a library", "on a bridge",
)  # fmt: skip
"""Places that no collage shows, for bases that know the world."""
SUBJECTS = 3
"""At most so many are named together."""
_CENTRED_ON = 8
_SEED = 104_729


class PictureScore:
    """Makes the same few pictures with whatever gates it is given, and scores them.

    Args:
        scorers: with ``knows`` at least.
        subjects: each with a cut-out; their pictures are what identity compares with.
        words: what an image-text model calls each of them.
        count: pictures, one per prompt.
        steps: denoising steps of each.
        size: side in pixels.
        seed: of the pictures.
    """

    def __init__(
        self, scorers: Scorers, base: Base, pipe: Any, subjects: Sequence[Subject], words: Sequence[str], *,
        count: int, steps: int, size: int, seed: int,
    ) -> None:  # fmt: skip
        if scorers.knows is None:
            raise InvalidRequest("Pictures are scored by a model that knows subjects again, and there is none.")
        self._base, self._pipe, self._aligns = base, pipe, scorers.aligns
        self._size, self._steps, self._seed = size, steps, seed + _SEED
        self.named = [_named(number, len(subjects)) for number in range(count)]
        self.prompts = [_prompt([s.phrase for s in subjects], named, self._ground(k)) for k, named in self._each()]
        self._texts = [_prompt(words, named, self._ground(k)) for k, named in self._each()]
        side = 0.5 if len(self.named[0]) < 3 else 0.35
        self._boxes = windows(size, size, scales=(side, 1.3 * side), stride=0.2)
        scenes = make_pool(pipe, base, subjects, _CENTRED_ON, self._seed, size=size,
                           config=CollageConfig.of(base, single=0))  # fmt: skip
        with torch.no_grad():
            shown = torch.cat([base.decode(pipe, row) for row in scenes.latents.split(1)]).cpu()
        self._knows = CentredIdentity.fit(scorers.knows, crops(shown, self._boxes, scorers.knows.size))
        views = {s.name: [as_tensor(view) for view in subject_cutouts(s)] for s in subjects}
        self._gallery = Gallery.build(views, self._knows)

    def measure(self, composition: Composition, traces: list[Trace] | None = None) -> dict[str, float]:
        """Score, identity, and alignment or the share found, each a mean over the pictures; no global state changes.

        Args:
            composition: attached; left in inference mode.
            traces: takes the weights of each picture.
        """
        with preserved_rng():
            pictures = torch.stack([self._draw(composition, number, traces) for number in range(len(self.prompts))])
        likeness = place_scores(pictures, self._gallery, self._knows, self._boxes).numpy()
        found = find_subjects(likeness, self.named, overlap(self._boxes).numpy(), -1.0)
        identity = np.array([np.mean(np.clip(np.nan_to_num(own), 0, None)) for own in found.identity])
        if self._aligns is None:
            name, other = "found", _found(likeness, found.places, self.named)
        else:
            cosines = torch.diagonal(self._aligns.score(pictures, self._texts))
            name, other = "alignment", cosines.clamp(min=0).double().numpy()
        return {
            "score": float((identity * other).mean()),
            "identity": float(identity.mean()),
            name: float(other.mean()),
        }

    def _draw(self, composition: Composition, number: int, traces: list[Trace] | None) -> Tensor:
        from mole_diffusion.generation import GenerationRequest, generate

        composition.eval()
        request = GenerationRequest(
            self.prompts[number], seed=self._seed + number, steps=self._steps, guidance=self._base.default_guidance,
            width=self._size, height=self._size, score_every=0, preview_every=0,
        )  # fmt: skip
        picture = generate(self._pipe, self._base, request, composition=composition).images[0]
        if traces is not None:
            traces.append(composition.trace())
        return to_tensor(picture)

    def _each(self) -> Sequence[tuple[int, tuple[int, ...]]]:
        return list(enumerate(self.named))

    def _ground(self, number: int) -> str:
        return background_phrase(DRAWN[number % len(DRAWN)]) if self._base.on_slots else REAL[number % len(REAL)]


def _named(number: int, subjects: int) -> tuple[int, ...]:
    """Which subjects prompt ``number`` names, in order: every one comes first in turn."""
    return tuple((number + place) % subjects for place in range(min(subjects, SUBJECTS)))


def _prompt(phrases: Sequence[str], named: Sequence[int], ground: str) -> str:
    return f"{' and '.join(article(phrases[number]) for number in named)} {ground}"


def _found(likeness: np.ndarray, places: Sequence[tuple[int, ...] | None], named: Sequence[tuple[int, ...]]) -> Any:
    """(B,) share of each picture's subjects whose place looks most like them."""
    shares = [
        0.0 if place is None else np.mean([scores[w].argmax() == c for w, c in zip(place, wanted, strict=True)])
        for scores, place, wanted in zip(likeness, places, named, strict=True)
    ]
    return np.array(shares, dtype=np.float64)
