"""The kinds of jobs: from a job's configuration to a task and the file that it writes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from mole_diffusion.bases import assets_dir, get_base
from mole_diffusion.errors import InvalidRequest
from training.build import GateExpert, build_gate, build_router, build_subject, phrase_of
from training.config import check, parse
from training.gate_cache import Ready, cached_composition, composition_key, store_composition
from training.loop import Task
from training.presets import preset
from training.ranks import Ranks
from training.tasks.gate_config import ExpertEntry, GateTrainingConfig
from training.tasks.router_config import RouterTrainingConfig
from training.tasks.subject import SubjectConfig


def _build_subject(settings: dict[str, Any], data_dir: Path, folder: Path, log: Any) -> tuple[Task, Path]:
    """``settings`` are those of SubjectConfig and ``images``, a folder below the data folder or the assets."""
    images = inside(str(settings.pop("images", "")), data_dir)
    config = SubjectConfig.of(settings.pop("preset", None), **settings)
    task = build_subject(config, images, folder, log, Ranks.here())
    return task, folder / "result.safetensors"


def _build_gate(settings: dict[str, Any], data_dir: Path, folder: Path, log: Any) -> tuple[Task, Path]:
    """Gates of a set that was trained before with the same settings come out of ``cache/``, unless ``reuse`` is off."""
    reuse = settings.pop("reuse", True)
    check(isinstance(reuse, bool), f"reuse is true or false, not {reuse!r}.")
    name = settings.pop("preset", None)
    config = parse(GateTrainingConfig, {**(preset(name).settings("gate") if name else {}), **settings})
    experts = [gate_expert(entry, data_dir) for entry in config.experts]
    out, cache = data_dir / "compositions" / f"{folder.name}.safetensors", data_dir / "cache"
    out.parent.mkdir(parents=True, exist_ok=True)
    key = composition_key(config, get_base(config.base), experts)
    if reuse and cached_composition(key, cache / "gates", experts, out) is not None:
        log("This set was trained before with the same settings; its gates are used again.")
        return Ready(experts, config.base), out
    task = build_gate(config, experts, cache / "views", log, ranks=Ranks.here())
    task.keep = lambda path: store_composition(path, key, cache / "gates")
    return task, out


def _build_router(settings: dict[str, Any], data_dir: Path, folder: Path, log: Any) -> tuple[Task, Path]:
    config = parse(RouterTrainingConfig, settings)
    experts = [gate_expert(entry, data_dir) for entry in config.experts]
    task = build_router(config, experts, folder, log, Ranks.here())
    return task, data_dir / "routers" / f"{folder.name}.safetensors"


BUILDERS: dict[str, Callable[[dict[str, Any], Path, Path, Any], tuple[Task, Path]]] = {
    "gate": _build_gate,
    "router": _build_router,
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
