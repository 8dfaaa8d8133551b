"""The kinds of jobs: from a job's configuration to a task and the file that it writes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from mole_diffusion.bases import assets_dir
from mole_diffusion.errors import InvalidRequest
from training.build import GateExpert, build_gate, build_subject, phrase_of
from training.config import parse
from training.loop import Task
from training.tasks.gate import ExpertEntry, GateTrainingConfig
from training.tasks.subject import SubjectConfig


def _build_subject(settings: dict[str, Any], data_dir: Path, folder: Path, log: Any) -> tuple[Task, Path]:
    """``settings`` are those of SubjectConfig and ``images``, a folder below the data folder or the assets."""
    images = inside(str(settings.pop("images", "")), data_dir)
    task = build_subject(parse(SubjectConfig, settings), images)
    return task, folder / "result.safetensors"


def _build_gate(settings: dict[str, Any], data_dir: Path, folder: Path, log: Any) -> tuple[Task, Path]:
    config = parse(GateTrainingConfig, settings)
    experts = [gate_expert(entry, data_dir) for entry in config.experts]
    task = build_gate(config, experts, folder, log)
    return task, data_dir / "compositions" / f"{folder.name}.safetensors"


BUILDERS: dict[str, Callable[[dict[str, Any], Path, Path, Any], tuple[Task, Path]]] = {
    "gate": _build_gate,
    "subject": _build_subject,
}


def gate_expert(entry: ExpertEntry, data_dir: Path) -> GateExpert:
    """An expert of the library with its pictures: those of the entry, else ``subjects/<sha256>/``, else none."""
    from mole_diffusion import Expert

    if len(entry.sha256) != 64 or set(entry.sha256) - set("0123456789abcdef"):
        raise InvalidRequest(f"An expert is named by its SHA-256 in hexadecimal, not {entry.sha256!r}.")
    path = data_dir / "experts" / f"{entry.sha256}.safetensors"
    if not path.is_file():
        raise InvalidRequest(f"The expert {entry.name} is no longer in the library; add its file again.")
    expert = Expert.load(path, name=entry.name, trigger=entry.trigger)
    if expert.sha256 != entry.sha256:
        raise InvalidRequest(f"The file of {entry.name} is not the one that was added; add it again.")
    own = data_dir / "subjects" / entry.sha256
    views = inside(entry.views, data_dir) if entry.views else own if own.is_dir() and any(own.iterdir()) else None
    return GateExpert(expert, phrase_of(expert, entry.trigger, entry.class_name), views)


def inside(text: str, data_dir: Path) -> Path:
    """A folder that a job names, absolute or relative to a root, if it lies in the data folder or the assets."""
    for root in (data_dir.resolve(), assets_dir().resolve()):
        path = (root / text).resolve()
        if text and path.is_relative_to(root) and path != root and path.is_dir():
            return path
    raise InvalidRequest(f"Expected a folder of pictures in the data folder or the assets, not {text!r}.")
