"""Checkpoints: one folder per step with safetensors and JSON, written whole or not at all, two kept."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

TENSORS = "state.safetensors"
VALUES = "state.json"
KEPT = 2


def pack(tree: Any, tensors: dict[str, torch.Tensor], path: str = "state") -> Any:
    """``tree`` as JSON values; its tensors go to ``tensors`` under their path, on the CPU."""
    if isinstance(tree, torch.Tensor):
        tensors[path] = tree.detach().to("cpu", copy=True).contiguous()
        return {"$tensor": path}
    if isinstance(tree, Mapping):
        return {"$dict": [[key, pack(value, tensors, f"{path}/{key}")] for key, value in tree.items()]}
    if isinstance(tree, tuple | list):
        kind = "$tuple" if isinstance(tree, tuple) else "$list"
        return {kind: [pack(value, tensors, f"{path}/{index}") for index, value in enumerate(tree)]}
    if tree is None or isinstance(tree, bool | int | float | str):
        return tree
    raise TypeError(f"a checkpoint holds tensors and JSON values, not {type(tree).__name__} at {path}")


def unpack(tree: Any, tensors: Mapping[str, torch.Tensor]) -> Any:
    """Inverse of :func:`pack`."""
    if not isinstance(tree, dict):
        return tree
    ((kind, value),) = tree.items()
    if kind == "$tensor":
        return tensors[value]
    if kind == "$dict":
        return {key: unpack(item, tensors) for key, item in value}
    items = [unpack(item, tensors) for item in value]
    return tuple(items) if kind == "$tuple" else items


def save_checkpoint(folder: Path, step: int, state: Mapping[str, Any]) -> Path:
    """Write ``state`` as ``folder/step-<step>`` and remove all but the two newest."""
    folder.mkdir(parents=True, exist_ok=True)
    temporary = folder / f".writing-{os.getpid()}"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    tensors: dict[str, torch.Tensor] = {}
    values = pack(dict(state), tensors)
    save_file(tensors, temporary / TENSORS)
    digest = hashlib.sha256((temporary / TENSORS).read_bytes()).hexdigest()
    (temporary / VALUES).write_text(json.dumps({"step": step, "sha256": digest, "state": values}))
    for name in (TENSORS, VALUES):
        _flush(temporary / name)
    target = folder / f"step-{step:08d}"
    shutil.rmtree(target, ignore_errors=True)
    os.replace(temporary, target)
    _prune(folder)
    return target


def load_latest(folder: Path) -> tuple[int, dict[str, Any], list[str]]:
    """The newest whole checkpoint as (step, state, what is wrong with damaged ones); (0, {}, …) without any.

    Damaged ones are set aside as ``damaged-step-…``, so that they do not count among the two that are kept.
    """
    skipped: list[str] = []
    for path in reversed(checkpoints(folder)):
        try:
            step, state = read_checkpoint(path)
        except (OSError, ValueError, KeyError, TypeError, RuntimeError) as error:
            skipped.append(f"{path.name} ({error})")
            _set_aside(path)
            continue
        return step, state, skipped
    return 0, {}, skipped


def read_checkpoint(path: Path) -> tuple[int, dict[str, Any]]:
    """Read one checkpoint folder. Raises ValueError where its content is not what was written."""
    record = json.loads((path / VALUES).read_text())
    digest = hashlib.sha256((path / TENSORS).read_bytes()).hexdigest()
    if digest != record["sha256"]:
        raise ValueError("its tensors differ from those that were written")
    return int(record["step"]), unpack(record["state"], load_file(path / TENSORS))


def clear(folder: Path) -> None:
    """Remove all checkpoints: a run that starts anew must not be resumed from an older one's."""
    for path in checkpoints(folder):
        shutil.rmtree(path)


def checkpoints(folder: Path) -> list[Path]:
    """The checkpoint folders, oldest first."""
    return sorted(path for path in folder.glob("step-*") if path.is_dir())


def _set_aside(path: Path) -> None:
    target = path.with_name(f"damaged-{path.name}")
    shutil.rmtree(target, ignore_errors=True)
    os.replace(path, target)


def _prune(folder: Path) -> None:
    for path in checkpoints(folder)[:-KEPT]:
        shutil.rmtree(path, ignore_errors=True)


def _flush(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())
