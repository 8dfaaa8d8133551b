"""Gates that were trained before: the same set of experts with the same settings is trained once.

The key is a hash of the settings and of the experts, in no order, each with its content, the words that call it and
the pictures that it was trained with, and of the base's weights. Files are stored and read back whole.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mole_diffusion.bases import Base
from mole_diffusion.errors import InvalidRequest, MoleError
from training.build.experts import GateExpert
from training.warm_start import reorder

if TYPE_CHECKING:
    from training.tasks.gate_config import GateTrainingConfig

RECIPE = 1
"""Rises whenever the same settings would train other gates."""


def composition_key(
    config: GateTrainingConfig, base: Base, experts: Sequence[GateExpert], *, warm_start: Path | None = None
) -> str:
    """SHA-256 in hexadecimal of everything that decides which gates come out."""
    settings = {key: value for key, value in asdict(config).items() if key not in ("base", "experts")}
    entries = {entry.sha256: entry.class_name for entry in config.experts}
    members = sorted([*_identity(item), entries.get(item.expert.sha256) or ""] for item in experts)
    warm = None if warm_start is None else _hash_of([warm_start])
    content = [RECIPE, settings, members, base.name, base.prediction_type, _weights(base), warm, _judges()]
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def cached_composition(key: str, folder: Path, experts: Sequence[GateExpert], out: Path) -> Path | None:
    """Write the gates that are stored under ``key`` to ``out``, in the order of ``experts``; None: there are none.

    A damaged file counts as none.
    """
    path = _path(key, folder)
    if not path.is_file():
        return None
    try:
        reorder(path, [header_of(item) for item in experts], out)
    except MoleError:
        return None
    return out


def store_composition(path: Path, key: str, folder: Path) -> Path:
    """Keep a finished composition under ``key``, atomically."""
    target = _path(key, folder)
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_suffix(f".{os.getpid()}.part")
    try:
        shutil.copyfile(path, temporary)
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)
    return target


def header_of(item: GateExpert) -> Mapping[str, Any]:
    """An expert as a composition's header names it."""
    expert = item.expert
    trigger = expert.trigger or item.phrase
    return {"name": expert.name, "sha256": expert.sha256, "trigger": trigger, "role": expert.role}


def _identity(item: GateExpert) -> list[str]:
    expert = item.expert
    words = [expert.trigger or item.phrase, item.phrase, expert.metadata.get("mole.class") or ""]
    if item.views is not None and not item.views.is_dir():
        raise InvalidRequest(f"Expected a folder of pictures, but {item.views} is not a folder.")
    pictures = [] if item.views is None else sorted(path for path in item.views.iterdir() if path.is_file())
    return [expert.sha256, *words, expert.role, _hash_of(pictures) if pictures else "its own pictures"]


def _hash_of(paths: Sequence[Path]) -> str:
    parts = [hashlib.sha256(path.read_bytes()).hexdigest() for path in paths]
    return hashlib.sha256("".join(parts).encode()).hexdigest()


def _weights(base: Base) -> list[Any]:
    """A base from the hub by its revision; a folder by name, size and time of its weight files."""
    if not base.is_local:
        return [base.source, base.revision]
    files = sorted(Path(base.source).rglob("*.safetensors"))
    facts = [(str(path.relative_to(base.source)), path.stat()) for path in files]
    return [[name, stat.st_size, stat.st_mtime_ns] for name, stat in facts]


def _judges() -> bool:
    """Whether the model is here that judges pictures; without it the loss says which gates are best."""
    return find_spec("efficientnet_lite_pytorch") is not None


def _path(key: str, folder: Path) -> Path:
    return folder / f"{key}.safetensors"


class Ready:
    """A task whose gates were trained before: nothing is left to do but to say where they are."""

    name = "gate"
    total_steps = 0

    def __init__(self, experts: Sequence[GateExpert], base: str) -> None:
        self._names, self._base = [item.expert.name for item in experts], base

    def step(self, index: int) -> dict[str, float]:
        """There is none."""
        raise NotImplementedError("gates out of the cache have no steps")

    def enough(self) -> bool:
        """True."""
        return True

    def state_dict(self) -> dict[str, Any]:
        """Nothing."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Nothing to load."""

    def sample(self, step: int, folder: Path) -> list[Any]:
        """None."""
        return []

    def finish(self, out: Path) -> dict[str, Any]:
        """The file is there already."""
        return {"path": str(out), "base": self._base, "experts": self._names, "cached": True}
