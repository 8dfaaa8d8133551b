"""Sample pictures during training: always the same seed, scored by the base's own scorer where it has one."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from mole_diffusion.bases import Base
from mole_diffusion.errors import MoleError
from training.events import Sample

if TYPE_CHECKING:
    from mole_diffusion import Composition
    from mole_diffusion.generation import SubjectPrompt
    from mole_diffusion.scoring import AlignmentScorer


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
) -> Sample:
    """Generate one picture, save it as PNG with its parameters, and give its scores."""
    from mole_diffusion.generation import GenerationRequest, generate
    from mole_diffusion.png import save_png

    request = GenerationRequest(
        prompt, seed=seed, steps=base.default_steps, guidance=base.default_guidance, width=size, height=size,
        subjects=subjects, score_every=0, preview_every=0,
    )  # fmt: skip
    result = generate(pipe, base, request, composition=composition, scorer=scorer)
    save_png(result.images[0], path, result.parameters_of(0))
    return Sample(str(path), step, result.scores[0] if result.scores else {}, prompt)


def scorer_of(base: Base, device: Any) -> AlignmentScorer | None:
    """The base's scorer, or None where its files are not on this machine: samples then come without scores."""
    from mole_diffusion.scoring import load_alignment

    try:
        return load_alignment(base, device)
    except MoleError:
        return None
