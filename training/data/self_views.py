"""Pictures of a bare expert's subject, made by that expert alone, cut out: what collages need when a user has none."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from mole_diffusion.bases import Base
from training.base.scenes import COLOURS, article

from .attention import AttentionRecorder, token_positions
from .masks import choose_mask, cut_out, rough_mask
from .subjects import Subject

if TYPE_CHECKING:
    from mole_diffusion import Expert

FEWEST = 2
"""Clear cut-outs that are enough; with fewer, all pictures are cut out roughly."""
FIRST = ("white", "gray", "blue", "green", "yellow")  # colours that come first: the plainest


def make_self_views(
    pipe: Any,
    base: Base,
    expert: Expert,
    phrase: str,
    folder: Path,
    *,
    count: int = 12,
    seed: int = 0,
    log: Callable[[str], None] = lambda text: None,
) -> Subject:
    """``count`` pictures by ``expert`` alone at full weight, cut out and saved as ``folder/NN.png``.

    Pictures without a plausible mask are left out. Where that leaves fewer than two, the log says so, and each
    picture is cut out roughly where the trigger's attention is.
    """
    folder.mkdir(parents=True, exist_ok=True)
    made = _make(pipe, base, expert, phrase, count, seed)
    clear = [(picture, mask) for picture, heat in made if (mask := choose_mask(picture, heat)) is not None]
    log(f"{len(clear)} of the {count} pictures that {expert.name} makes alone show a clear subject for “{phrase}”.")
    if len(clear) < min(FEWEST, count):
        log(f"So they are cut out roughly; better check the trigger of {expert.name}, or give pictures of its subject.")
        clear = [(picture, rough_mask(picture.size, heat)) for picture, heat in made]
    views = tuple(cut_out(picture, mask) for picture, mask in clear)
    for number, view in enumerate(views):
        view.save(folder / f"{number:02d}.png")
    return Subject(expert.name, phrase, views)


def _make(
    pipe: Any, base: Base, expert: Expert, phrase: str, count: int, seed: int
) -> list[tuple[Image.Image, np.ndarray | None]]:
    """Pictures on plain backgrounds, each with the attention (H, W) that the phrase's tokens got."""
    from mole_diffusion import StaticWeights, compose

    colours = list(dict.fromkeys([*FIRST, *COLOURS]))
    with compose(pipe, [expert], gate=StaticWeights((1.0,)), base=base) as composition:
        prompts = [f"{article(phrase)} on {article(colours[n % len(colours)])} background" for n in range(count)]
        return [_make_one(pipe, base, composition, prompt, phrase, seed + n) for n, prompt in enumerate(prompts)]


def _make_one(
    pipe: Any, base: Base, composition: Any, prompt: str, phrase: str, seed: int
) -> tuple[Image.Image, np.ndarray | None]:
    from mole_diffusion.generation import GenerationRequest, generate

    request = GenerationRequest(
        prompt, seed=seed, steps=base.default_steps, guidance=base.default_guidance, score_every=0, preview_every=0
    )
    positions = token_positions(pipe.tokenizer, prompt, phrase)
    with AttentionRecorder(pipe.unet, positions) as recorder:
        picture = generate(pipe, base, request, composition=composition).images[0]
    return picture, recorder.heat(picture.height) if positions else None
