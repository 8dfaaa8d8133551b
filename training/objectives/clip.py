"""The CLIP objective of MoLE (arXiv 2404.13628, section 3.3: "local and global guidance from CLIP"), on x̂0.

With unit vectors E_I of pictures and E_T of texts, for a scene and its subjects i:

    global     1 − cos(E_I(x̂0), E_T(scene))
    local      1 − cos(E_I(place of i in x̂0), E_T(class of i))
    direction  1 − cos(E_I(place of i) − mean E_I(pictures of i), E_T(scene) − E_T(class of i))

Texts hold class words in place of triggers, which no image-text model has heard of. L_clip is the weighted mean of the
three, in 0…2. The authors' code takes −log((2.5 − (global + direction)) / 2), which has no value where the two sum to
2.5 or more; near the usual 1.6 its slope is 1.1, so that it differs from the plain sum by a factor alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import product
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from mole_diffusion.bases import Base
from mole_diffusion.scoring import AlignmentScorer
from mole_diffusion.scoring.views import frame, on_background
from training.base.scenes import article
from training.data.subjects import Subject

from .collage import subject_cutouts
from .views import as_tensor

Box = tuple[float, float, float, float]
_SIDE = 256
_VISIBLE = 0.15
_MARGIN = 0.08
_GREYS = torch.tensor([[0.25] * 3, [0.5] * 3, [0.75] * 3])


def cosine_distance(a: Tensor, b: Tensor) -> Tensor:
    """1 − cos of vectors (…, D), in 0…2; 1, with a bounded gradient, where one of them vanishes."""
    lengths = (a.square().sum(-1) + 1e-6).sqrt() * (b.square().sum(-1) + 1e-6).sqrt()
    return 1 - (a * b).sum(-1) / lengths


def mask_box(mask: Tensor, *, margin: float = _MARGIN) -> Box | None:
    """The square around a mask (h, w), inside the picture: (left, top, right, bottom) in 0…1; None if it is empty."""
    rows, columns = (torch.nonzero(mask.amax(axis) > _VISIBLE).flatten().tolist() for axis in (1, 0))
    if not rows:
        return None
    height, width = mask.shape
    top, bottom = rows[0] / height, (rows[-1] + 1) / height
    left, right = columns[0] / width, (columns[-1] + 1) / width
    side = min(max(bottom - top, right - left) * (1 + 2 * margin), 1.0)
    x, y = (min(max((low + high - side) / 2, 0.0), 1 - side) for low, high in ((left, right), (top, bottom)))
    return x, y, x + side, y + side


def places(pictures: Tensor, rows: Sequence[int], boxes: Sequence[Box], side: int) -> Tensor:
    """Crops (K, 3, side, side) of box k out of picture rows[k] of (B, 3, H, W); differentiable."""
    from torchvision.ops import roi_align

    height, width = pictures.shape[-2:]
    scale = torch.tensor([width, height, width, height], dtype=torch.float32)
    corners = torch.cat([torch.tensor(rows, dtype=torch.float32)[:, None], torch.tensor(boxes) * scale], 1)
    return roi_align(pictures.float(), corners.to(pictures.device), (side, side), aligned=True)


def decode_small(base: Base, pipe: Any, latents: Tensor, side: int, *, sparing: bool) -> Tensor:
    """Pictures (B, 3, s, s) in 0…1 of latents (B, C, h, w), s at most about ``side`` pixels, with gradients.

    Larger latents are averaged down first, which blurs but keeps who is where. ``sparing``: one row after the other,
    and the decoder runs again in the backward pass instead of keeping what it saw.
    """
    most = max(1, base.latent_shape()[1] * side // base.resolution)
    if max(latents.shape[-2:]) > most:
        latents = F.adaptive_avg_pool2d(latents, most)
    if not sparing:
        return base.decode(pipe, latents)
    return torch.cat([_again(lambda row: base.decode(pipe, row), row) for row in latents.split(1)])


def _again(function: Callable[[Tensor], Tensor], given: Tensor) -> Tensor:
    """``function(given)``, computed again in the backward pass."""
    found = checkpoint(function, given, use_reentrant=False)
    assert isinstance(found, Tensor)
    return found


class ClipObjective:
    """L_clip for the scenes of one set of subjects.

    Args:
        scorer: the image-text model that trains; frozen.
        base, pipe: decode x̂0; frozen.
        subjects: each with a cut-out.
        words: what an image-text model calls each of them ("robot").
        weights: of (global, local, direction), not all 0.
        side: pixels at which x̂0 is decoded; None: the base's resolution, at most 256.
        sparing: save memory for time; None: with full-size bases.
    """

    def __init__(
        self, scorer: AlignmentScorer, base: Base, pipe: Any, subjects: Sequence[Subject], words: Sequence[str],
        weights: tuple[float, float, float], *, side: int | None = None, sparing: bool | None = None,
    ) -> None:  # fmt: skip
        self.scorer, self.base, self.pipe, self.weights = scorer, base, pipe, weights
        self.phrases, self.words = [subject.phrase for subject in subjects], list(words)
        self.side = side or min(base.resolution, _SIDE)
        self.sparing = base.full_size if sparing is None else sparing
        self._crop = min(scorer.preprocess.size)
        self._references = torch.stack([self._reference(subject) for subject in subjects])

    def scene(self, prompt: str) -> str:
        """A prompt with class words in place of the subjects' phrases."""
        for phrase, words in zip(self.phrases, self.words, strict=True):
            prompt = prompt.replace(article(phrase), article(words)).replace(phrase, words)
        return prompt

    def __call__(self, latents: Tensor, masks: Tensor, prompts: Sequence[str]) -> Tensor:
        """L_clip (B,) of x̂0 as latents (B, C, h, w), with the scenes' masks (B, N, h, w) and prompts."""
        pictures = decode_small(self.base, self.pipe, latents.float(), self.side, sparing=self.sparing)
        scenes = self.scorer.embed_texts([self.scene(prompt) for prompt in prompts])
        whole = cosine_distance(self._embed(pictures), scenes)
        local, direction = self._subjects(pictures, masks, scenes)
        terms = zip(self.weights, (whole, local, direction), strict=True)
        return torch.stack([weight * term for weight, term in terms]).sum(0) / sum(self.weights)

    def _subjects(self, pictures: Tensor, masks: Tensor, scenes: Tensor) -> tuple[Tensor, Tensor]:
        """Local and direction terms (B,), each the mean over the subjects that a scene shows."""
        rows, numbers, boxes = _shown(masks.float().cpu())
        zero = pictures.new_zeros(len(pictures))
        if not any(self.weights[1:]) or not rows:
            return zero, zero
        seen = self._embed(places(pictures, rows, boxes, self._crop))
        own = self.scorer.embed_texts([article(self.words[number]) for number in numbers])
        local = cosine_distance(seen, own)
        direction = cosine_distance(seen - self._references[numbers], scenes[rows] - own)
        where = torch.tensor(rows, device=seen.device)
        shown = torch.bincount(where, minlength=len(pictures)).clamp(min=1)
        return zero.index_add(0, where, local) / shown, zero.index_add(0, where, direction) / shown

    def _embed(self, pictures: Tensor) -> Tensor:
        return _again(self.scorer.embed_images, pictures) if self.sparing else self.scorer.embed_images(pictures)

    @torch.no_grad()
    def _reference(self, subject: Subject) -> Tensor:
        """Mean E_I (D,) of a subject's cut-outs, framed like its places in scenes, on greys."""
        framed = torch.stack([frame(as_tensor(view), self._crop) for view in subject_cutouts(subject)])
        return self.scorer.embed_images(on_background(framed, _GREYS).flatten(0, 1)).mean(0)


def _shown(masks: Tensor) -> tuple[list[int], list[int], list[Box]]:
    """Row, number and box of every subject that is visible in scenes with masks (B, N, h, w)."""
    rows: list[int] = []
    numbers: list[int] = []
    boxes: list[Box] = []
    for row, number in product(range(masks.shape[0]), range(masks.shape[1])):
        box = mask_box(masks[row, number])
        if box is not None:
            rows.append(row)
            numbers.append(number)
            boxes.append(box)
    return rows, numbers, boxes
