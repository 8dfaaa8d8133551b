"""Experts as tasks take them: found by file or name, with the phrase that calls their subject and its pictures."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from mole_diffusion.bases import assets_dir
from mole_diffusion.errors import InvalidRequest
from training.data.subjects import subject_phrase

if TYPE_CHECKING:
    from mole_diffusion import Expert


@dataclass(frozen=True)
class GateExpert:
    """An expert with the phrase that names its subject, and the folder of its pictures if there is one."""

    expert: Expert
    phrase: str
    views: Path | None = None


def find_expert(name: str) -> tuple[Expert, Path | None]:
    """An expert by file, or a demo expert by name, with the demo's pictures of it where they exist."""
    from mole_diffusion import Expert

    path = Path(name)
    if not path.is_file():
        demo = assets_dir() / "demo" / "experts" / f"{name}.safetensors"
        if Path(name).name != name or not demo.is_file():
            raise InvalidRequest(f"{name} is neither a file nor a demo expert.")
        path = demo
    expert = Expert.load(path)
    views = assets_dir() / "demo" / "subjects" / path.stem / "train"
    return expert, views if path.parent == assets_dir() / "demo" / "experts" and views.is_dir() else None


def phrase_of(expert: Expert, trigger: str | None = None, class_name: str | None = None) -> str:
    """What calls an expert's subject: the given words, else those of its file."""
    return subject_phrase(trigger or expert.trigger, class_name or expert.metadata.get("mole.class"))
