"""The demo subjects: characters that the base has never seen, with training and held-out views (all CC0, by Kenney)."""

from __future__ import annotations

import io
import json
import zipfile
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from training.base.corpus import crop_to_alpha, fetch_wheel

ARCADE = "arcade==3.3.3"
PROCGEN = "procgen==0.10.7"
_PROCGEN_FLAGS = ("--only-binary=:all:", "--python-version", "3.10", "--implementation", "cp",
                  "--platform", "manylinux_2_17_x86_64", "--platform", "manylinux2014_x86_64")  # fmt: skip
_POSES = {"train": ("idle", "jump", "walk0", "walk2"), "heldout": ("fall", "walk4")}
_ALIEN_POSES = {"train": ("stand", "walk1", "jump", "front"), "heldout": ("walk2", "hit")}


@dataclass(frozen=True)
class DemoSubject:
    """``source`` is the character's folder (arcade) or colour (alien); the trigger phrase is ``token class_name``."""

    name: str
    source: str
    class_name: str
    token: str
    alien: bool = False


SUBJECTS = (
    DemoSubject("robot", "robot", "robot", "sks"),
    DemoSubject("zombie", "zombie", "zombie", "ohwx"),
    DemoSubject("adventuress", "female_adventurer", "woman", "zwx"),
    DemoSubject("adventurer", "male_adventurer", "man", "vbn"),
    DemoSubject("mia", "female_person", "woman", "qpl"),
    DemoSubject("leo", "male_person", "man", "jxk"),
    DemoSubject("greenling", "Green", "alien", "wqz", alien=True),
    DemoSubject("pinkling", "Pink", "alien", "tfx", alien=True),
)


def write_subjects(folder: Path, cache: Path) -> None:
    """``folder/<name>/{train,heldout}/NN.png`` (RGBA, 128 px at most) and ``subject.json``."""
    arcade = zipfile.ZipFile(fetch_wheel(ARCADE, cache))
    procgen = zipfile.ZipFile(fetch_wheel(PROCGEN, cache, *_PROCGEN_FLAGS))
    for subject in SUBJECTS:
        for part, poses in (_ALIEN_POSES if subject.alien else _POSES).items():
            (folder / subject.name / part).mkdir(parents=True, exist_ok=True)
            for index, pose in enumerate(poses):
                data = procgen.read(_alien(subject, pose)) if subject.alien else arcade.read(_character(subject, pose))
                with Image.open(io.BytesIO(data)) as image:
                    view = Image.fromarray(crop_to_alpha(image, 128))
                view.save(folder / subject.name / part / f"{index:02d}.png", optimize=True)
        (folder / subject.name / "subject.json").write_text(json.dumps(_card(subject), indent=2) + "\n")


def _character(subject: DemoSubject, pose: str) -> str:
    folder = "arcade/resources/assets/images/animated_characters"
    return f"{folder}/{subject.source}/{_PREFIX[subject.source]}_{pose}.png"


_PREFIX = {
    "robot": "robot", "zombie": "zombie", "female_adventurer": "femaleAdventurer", "male_adventurer": "maleAdventurer",
    "female_person": "femalePerson", "male_person": "malePerson",
}  # fmt: skip


def _alien(subject: DemoSubject, pose: str) -> str:
    return f"procgen/data/assets/kenney/Players/128x256/{subject.source}/alien{subject.source}_{pose}.png"


def _card(subject: DemoSubject) -> dict[str, str]:
    package = PROCGEN if subject.alien else ARCADE
    return {
        "name": subject.name, "class": subject.class_name, "trigger": subject.token,
        "prompt": f"a {subject.token} {subject.class_name}", "licence": "CC0-1.0",
        "source": f"Kenney (kenney.nl), from the Python package {package}",
    }  # fmt: skip
