"""A subject: what it is called and its pictures."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from mole_diffusion.errors import InvalidRequest

from .pictures import has_mask, read_pictures


@dataclass(frozen=True)
class Subject:
    """``phrase`` names it in a prompt, for instance "zwx robot"; views are RGBA cut-outs or RGB photos.

    ``captions`` holds one for each view, None where a view has none; empty: no view has one.
    """

    name: str
    phrase: str
    views: tuple[Image.Image, ...]
    captions: tuple[str | None, ...] = ()

    @property
    def cutouts(self) -> tuple[Image.Image, ...]:
        """The views with a mask, cropped to what is visible."""
        return tuple(crop_to_mask(view) for view in self.views if has_mask(view))


def subject_phrase(trigger: str | None, class_name: str | None) -> str:
    """Trigger and class as one phrase: ("zwx", "robot") and ("zwx robot", "robot") both give "zwx robot"."""
    trigger, class_name = (trigger or "").strip(), (class_name or "").strip()
    if not trigger and not class_name:
        raise InvalidRequest("A subject needs a trigger or a class to be named in prompts; give one of them.")
    words = trigger.lower().split()
    known = class_name.lower().split()
    inside = any(words[start : start + len(known)] == known for start in range(len(words)))
    return trigger if inside or not known else f"{trigger} {class_name}".strip()


def load_subject(name: str, phrase: str, folder: Path) -> Subject:
    """Read a subject's pictures. Raises InvalidRequest where there are none or one cannot be read."""
    return Subject(name, phrase, tuple(read_pictures(folder)))


def crop_to_mask(view: Image.Image) -> Image.Image:
    """The part of an RGBA view that its mask covers."""
    box = view.getchannel("A").point([0] * 16 + [255] * 240).getbbox()
    return view.crop(box) if box else view
