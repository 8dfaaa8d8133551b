"""Tiny jobs of every kind: short steps, close checkpoints, samples, and everything that they read."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

STEPS, SAVE_EVERY, SAMPLE_EVERY = 40, 5, 20
SUBJECTS = {"robot": "red", "alien": "green", "bunny": "blue", "cat": "yellow"}
SCHEDULE = {"steps": STEPS, "save_every": SAVE_EVERY, "sample_every": SAMPLE_EVERY}


@dataclass(frozen=True)
class Recipe:
    """One kind of job: its configuration, and how many steps lie between two checkpoints."""

    kind: str
    config: Mapping[str, Any]
    save_every: int
    sample_every: int = 0

    @property
    def steps(self) -> int:
        """The job's last step."""
        return int(self.config["steps"])


@dataclass(frozen=True)
class Materials:
    """What the jobs read, made once: copied into the data folder of each arena."""

    recipes: Mapping[str, Recipe]
    folder: Path | None = None
    """Its content belongs into a data folder; None: the jobs read nothing."""
    missing: tuple[str, ...] = field(default=())
    """Kinds of jobs that ought to be here and are not."""

    def place(self, data: Path) -> None:
        """Copy what the jobs read into a data folder."""
        data.mkdir(parents=True, exist_ok=True)
        if self.folder is not None:
            shutil.copytree(self.folder, data, dirs_exist_ok=True)


def make_materials(root: Path) -> Materials:
    """A tiny base, subjects and experts below ``root``, and a recipe for each kind of job that can be built."""
    from tests.tiny import tiny_lora, tiny_sd, tiny_subject
    from training.jobs.kinds import BUILDERS

    base, data = root / "base", root / "materials"
    pipe = tiny_sd()
    pipe.save_pretrained(base)
    entries = []
    for seed, (name, colour) in enumerate(SUBJECTS.items(), 1):
        made = tiny_subject(data / "subjects", name, colour)
        metadata = {"modelspec.trigger_phrase": f"zwx {name}", "mole.class": name}
        file = tiny_lora(root / f"{name}.safetensors", pipe, seed=seed, metadata=metadata)
        sha256 = hashlib.sha256(file.read_bytes()).hexdigest()
        (data / "experts").mkdir(parents=True, exist_ok=True)
        shutil.move(file, data / "experts" / f"{sha256}.safetensors")
        entry = {"sha256": sha256, "name": name, "trigger": f"zwx {name}", "class": name}
        views = {"views": f"subjects/{made.name}/train"}
        entries.append(entry | (views if name != "alien" else {}))  # which makes its own, and may be killed meanwhile
    recipes = {}
    for kind, config in _CONFIGS.items():
        if kind in BUILDERS:
            recipes[kind] = Recipe(kind, {"base": str(base), **SCHEDULE, **config(entries)}, SAVE_EVERY, SAMPLE_EVERY)
    return Materials(recipes, data, tuple(kind for kind in _CONFIGS if kind not in BUILDERS))


def _subject(entries: list[dict[str, str]]) -> dict[str, Any]:
    return {
        "token": "zwx", "class": "robot", "images": "subjects/robot/train", "name": "robot",
        "batch": 2, "pool": 4, "rank": 2,
    }  # fmt: skip


def _gate(entries: list[dict[str, str]]) -> dict[str, Any]:
    small = {"batch": 2, "pool": 4, "validation": 2, "validate_every": 10, "self_views": 2}
    return {**small, "experts": entries[:2], "reuse": False}  # what is killed is training, not a copy


def _router(entries: list[dict[str, str]]) -> dict[str, Any]:
    small = {"batch": 2, "pool": 14, "validation": 2, "validate_every": 10, "self_views": 2, "rank": 3}
    return {**small, "group": 2, "held_out": 0.5, "distractors": 1, "experts": entries}


_CONFIGS: dict[str, Callable[[list[dict[str, str]]], dict[str, Any]]] = {
    "subject": _subject,
    "gate": _gate,
    "router": _router,
}
