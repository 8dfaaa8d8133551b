"""Sample pictures during training: always the same seed, weights as they would be saved, scored, nothing changed.

Alignment comes from the base's own image-text model. Identity comes from EfficientNet-Lite0 where it is installed,
which no objective trains with, else from the image tower of the image-text model.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from mole_diffusion.bases import Base
from mole_diffusion.errors import InvalidRequest, MoleError
from training.data.paste import to_tensor
from training.events import Sample
from training.rng import preserved_rng

if TYPE_CHECKING:
    from PIL.Image import Image

    from mole_diffusion import Composition
    from mole_diffusion.generation import SubjectPrompt
    from mole_diffusion.scoring import AlignmentScorer, IdentityScorer

Views = Mapping[str, Sequence["Image"]]


def make_samples(
    pipe: Any, base: Base, prompts: Sequence[str], folder: Path, step: int, **options: Any
) -> Iterator[Sample]:
    """One picture for every prompt, all with the same seed: ``folder/<step>-<number>.png``; see :func:`make_sample`."""
    for number, prompt in enumerate(prompts, start=1):
        yield make_sample(pipe, base, prompt, folder / f"{step:06d}-{number}.png", step, **options)


def make_sample(
    pipe: Any,
    base: Base,
    prompt: str,
    path: Path,
    step: int,
    *,
    seed: int,
    size: int | None = None,
    composition: Composition | None = None,
    scorer: AlignmentScorer | None = None,
    subjects: tuple[SubjectPrompt, ...] = (),
    views: Views | None = None,
    identity: IdentityScorer | None = None,
) -> Sample:
    """Generate one picture, save it as PNG with its parameters, and give its scores.

    Networks are in evaluation mode meanwhile, so adapters work at their true weight, without dropout; modes and random
    state are put back.

    Args:
        scorer: gives the alignment with the prompt and with each of ``subjects``; None: no alignment.
        views: the subjects' pictures by name, RGBA cut-outs or photos; each gets an identity.
        identity: compares a subject's place with its pictures; None: see :func:`identity_scorer`.
    """
    from mole_diffusion.generation import GenerationRequest, generate
    from mole_diffusion.png import save_png

    request = GenerationRequest(
        prompt, seed=seed, steps=base.default_steps, guidance=base.default_guidance, width=size, height=size,
        subjects=subjects, score_every=0, preview_every=0,
    )  # fmt: skip
    with preserved_rng(), evaluating(pipe, composition):
        result = generate(pipe, base, request, composition=composition, scorer=scorer)
        save_png(result.images[0], path, result.parameters_of(0))
        judge = (identity or identity_scorer(scorer, pipe.unet.device)) if views else None
        found = identity_of(result.images[0], views, judge) if views and judge is not None else {}
    labels = tuple(item.label for item in (scorer, judge) if item is not None)
    return Sample(str(path), step, result.scores[0] if result.scores else {}, prompt, found, labels)


def scorer_of(base: Base, device: Any) -> AlignmentScorer | None:
    """The base's scorer, or None where its files are not on this machine: samples then come without alignment."""
    from mole_diffusion.scoring import load_alignment

    try:
        with preserved_rng():  # a model draws its weights before it reads them
            return load_alignment(base, device)
    except MoleError:
        return None


def identity_scorer(alignment: AlignmentScorer | None, device: Any) -> IdentityScorer | None:
    """EfficientNet-Lite0 where it is installed, else the image tower of ``alignment``, else None."""
    from mole_diffusion.scoring import ClipIdentity

    return _efficientnet(str(device)) or (ClipIdentity(alignment) if alignment is not None else None)


@cache
def _efficientnet(device: str) -> IdentityScorer | None:
    from mole_diffusion.scoring import EfficientNetIdentity

    try:
        return EfficientNetIdentity(device=device)
    except InvalidRequest:
        return None


def identity_of(picture: Image, views: Views, scorer: IdentityScorer) -> dict[str, float]:
    """Likeness of each subject's place in a picture to its views, −1…1; one place serves one subject.

    Where no choice of places keeps the subjects apart, each counts at its best one.
    """
    from mole_diffusion.scoring import Gallery, find_subjects, overlap, place_scores, windows
    from mole_diffusion.scoring.views import PALETTE, border_colours

    image = to_tensor(picture.convert("RGB"))[None]
    # Of the grounds that views are laid on, only the one nearest to this picture's border counts.
    ground = PALETTE[int(torch.cdist(border_colours(image), torch.tensor(PALETTE)).argmin())]
    shown = {name: [_rgba(view) for view in pictures] for name, pictures in views.items()}
    gallery = Gallery.build(shown, scorer, palette=[ground])
    boxes = windows(*image.shape[2:])
    scores = place_scores(image, gallery, scorer, boxes).numpy()
    found = find_subjects(scores, [tuple(range(len(views)))], overlap(boxes).numpy(), threshold=-1.0)
    best = found.identity[0] if found.places[0] is not None else scores[0].max(0)
    return {name: float(value) for name, value in zip(views, best, strict=True)}


def _rgba(view: Image) -> torch.Tensor:
    """(4, H, W) in 0…1; a photo without a mask is all subject."""
    import numpy as np

    return torch.from_numpy(np.asarray(view.convert("RGBA"), dtype=np.float32) / 255).permute(2, 0, 1)


@contextmanager
def evaluating(pipe: Any, composition: Composition | None = None) -> Iterator[None]:
    """Every network of the pipeline, and the gate, in evaluation mode; afterwards each module in its own as before."""
    parts = [part for part in pipe.components.values() if isinstance(part, torch.nn.Module)]
    parts += [] if composition is None else [composition.gate]
    modes = [(module, module.training) for part in parts for module in part.modules()]
    try:
        for part in parts:
            part.eval()
        yield
    finally:
        for module, mode in modes:
            module.training = mode
