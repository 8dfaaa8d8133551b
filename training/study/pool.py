"""A pool of cheap experts for the router: things that the demo base was never told of, one LoRA each.

Their pictures are emoji that no caption of the base names, drawn in the style of those that it knows; each gets the
class of a thing that the base does know and a trigger of its own. None of the demo subjects is among them.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from mole_diffusion.bases import Base
from mole_diffusion.errors import InvalidRequest
from training.base.corpus import EMOJI, NAMES, crop_to_alpha
from training.base.subjects import SUBJECTS

if TYPE_CHECKING:
    from training.study.bench import Job

CORPUS = Path(".cache/corpus")
RANK, STEPS, BATCH, RATE, PICTURES = 8, 90, 4, 2e-3, 64
CONSONANTS = "bcdfghjklmnpqrstvwxz"

THINGS: tuple[tuple[str, str], ...] = (
    ("prince", "man"), ("black cat", "cat"), ("mermaid", "woman"), ("T-Rex", "turtle"), ("poodle", "dog"),
    ("goblin", "alien"), ("rooster", "duck"), ("ninja", "person"), ("racing car", "car"), ("vampire", "zombie"),
    ("polar bear", "panda"), ("man firefighter", "man"), ("shark", "dolphin"), ("princess", "woman"),
    ("wolf", "fox"), ("alien monster", "alien"), ("boar", "pig"), ("lobster", "crab"), ("man astronaut", "man"),
    ("peacock", "parrot"), ("woman cook", "woman"), ("leopard", "tiger"), ("violin", "guitar"), ("troll", "zombie"),
    ("kangaroo", "rabbit"), ("Santa Claus", "man"), ("squid", "octopus"), ("rhinoceros", "elephant"),
    ("jack-o-lantern", "ghost"), ("Mrs. Claus", "woman"), ("eagle", "owl"), ("deer", "giraffe"),
    ("man mage", "man"), ("fire engine", "bus"), ("hamster", "hedgehog"), ("ogre", "zombie"), ("ox", "cow"),
    ("woman scientist", "woman"), ("blowfish", "fish"), ("raccoon", "fox"), ("clown face", "robot"),
    ("swan", "flamingo"), ("man police officer", "man"), ("sauropod", "turtle"), ("beetle", "ladybug"),
    ("woman fairy", "woman"), ("motorcycle", "bicycle"), ("sloth", "koala"),
)  # fmt: skip
"""Emoji label and the class that calls it."""


def jobs(out: Path, only: list[int] | None) -> list[Job]:
    """One expert each; its card is written last, so that one whose card exists is whole."""
    folder = out / "pool"
    tokens = _tokens(len(THINGS))
    found: list[Job] = []
    for number in only if only is not None else range(len(THINGS)):
        label, class_name = THINGS[number]
        work = partial(make_expert, folder, label, class_name, tokens[number], number)
        found.append((folder / f"{slug(label)}.json", work))
    return found


def make_expert(folder: Path, label: str, class_name: str, token: str, number: int) -> dict[str, Any]:
    """Train one expert from one picture into ``folder``; its picture goes to ``folder/views/<name>``."""
    from training.build import load_base
    from training.data.subjects import load_subject
    from training.tasks.subject import SubjectConfig, SubjectTask

    started, name = time.monotonic(), slug(label)
    views = folder / "views" / name
    views.mkdir(parents=True, exist_ok=True)
    Image.fromarray(crop_to_alpha(picture_of(label), 128)).save(views / "00.png", optimize=True)
    config = SubjectConfig(
        "demo", token, class_name, name, rank=RANK, steps=STEPS, batch=BATCH, lr=RATE, seed=number, pool=PICTURES
    )
    base, pipe = _base(load_base)
    task = SubjectTask(config, base, pipe, load_subject(name, config.phrase, views))
    try:
        losses = [task.step(step)["loss"] for step in range(task.total_steps)]
        task.finish(folder / f"{name}.safetensors")
    finally:
        task.close()
    return {
        "name": name, "label": label, "class": class_name, "trigger": token, "phrase": config.phrase, "rank": RANK,
        "steps": STEPS, "batch": BATCH, "seconds": time.monotonic() - started,
        "first_loss": float(np.mean(losses[:20])), "last_loss": float(np.mean(losses[-20:])),
        "source": f"{EMOJI} (MIT), named by {NAMES} (MIT)",
    }  # fmt: skip


def picture_of(label: str) -> Image.Image:
    """The emoji of a label, RGBA. Raises InvalidRequest where the corpus is not on this machine."""
    files, codes = _corpus(CORPUS)
    with Image.open(files[codes[label].lower().replace("-fe0f", "")]) as image:
        return image.convert("RGBA")


def slug(label: str) -> str:
    """A file name: "Mrs. Claus" → "mrs-claus"."""
    return "-".join("".join(c if c.isalnum() else " " for c in label.lower()).split())


@cache
def _corpus(cache_dir: Path) -> tuple[dict[str, Path], dict[str, str]]:
    folders = [cache_dir / package.replace("/", "_").replace("@", "_") / "package" for package in (EMOJI, NAMES)]
    if not all(folder.is_dir() for folder in folders):
        raise InvalidRequest(
            f"The pool's pictures are not below {cache_dir}: run 'python -m training base --stages scenes' once, which "
            "fetches them with npm."
        )
    files = {path.stem.replace("-fe0f", ""): path for path in (folders[0] / "assets").glob("*.webp")}
    codes: dict[str, str] = {}
    for entry in json.loads((folders[1] / "en" / "data.json").read_text("utf-8")):
        codes.setdefault(entry["label"], entry["hexcode"])
    return files, codes


def _tokens(count: int) -> list[str]:
    """Blank words of three consonants, each once, none of them a demo subject's."""
    rng, taken = np.random.default_rng(417), {subject.token for subject in SUBJECTS}
    found: list[str] = []
    while len(found) < count:
        word = "".join(rng.choice(list(CONSONANTS), 3))
        if word not in taken:
            taken.add(word)
            found.append(word)
    return found


_loaded: list[tuple[Base, Any]] = []


def _base(load: Callable[[str, str | None], tuple[Base, Any]]) -> tuple[Base, Any]:
    """The demo base, loaded once for the whole pool."""
    if not _loaded:
        _loaded.append(load("demo", None))
    return _loaded[0]
