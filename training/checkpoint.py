"""Checkpoints: one folder per step with safetensors and JSON, written whole or not at all, two kept."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
import socket
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import psutil
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from training.errors import TrainingFailed

TENSORS = "state.safetensors"
VALUES = "state.json"
KEPT = 2
MAX_VALUES = 64 * 2**20
"""Bytes of JSON; a real state has some hundred kilobytes."""
FULL = (errno.ENOSPC, errno.EDQUOT)
"""What the system says of a disk, or a share of it, that is full."""
_NAME = re.compile(r"step-\d{8}")


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
    """Write ``state`` as ``folder/step-<step>`` and remove all but the two newest.

    Raises TrainingFailed where the disk is full or cannot be written: older checkpoints stay, nothing half is left.
    """
    tensors: dict[str, torch.Tensor] = {}
    values = pack(dict(state), tensors)
    weights = save(tensors)
    record = {"step": step, "bytes": len(weights), "sha256": hashlib.sha256(weights).hexdigest(), "state": values}
    text = json.dumps(record).encode()
    temporary = folder / f".writing-{socket.gethostname()}-{os.getpid()}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _sweep(folder)
        temporary.mkdir()
        _write(temporary / TENSORS, weights)
        _write(temporary / VALUES, text)
        target = _place(temporary, folder / f"step-{step:08d}")
    except OSError as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise _unwritten(step, len(weights) + len(text), error) from error
    for path in checkpoints(folder)[:-KEPT]:
        shutil.rmtree(path, ignore_errors=True)
    return target


def load_latest(folder: Path) -> tuple[int, dict[str, Any], list[str]]:
    """The newest whole checkpoint as (step, state, what is wrong with damaged ones); (0, {}, …) without any.

    Damaged ones are set aside as ``damaged-step-…``, so that they do not count among the two that are kept.
    """
    skipped: list[str] = []
    for path in reversed(checkpoints(folder)):
        try:
            step, state = read_checkpoint(path)
        except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
            skipped.append(f"{path.name} ({error})")
            aside = path.with_name(f"damaged-{path.name}")
            shutil.rmtree(aside, ignore_errors=True)
            os.replace(path, aside)
            continue
        return step, state, skipped
    return 0, {}, skipped


def read_checkpoint(path: Path) -> tuple[int, dict[str, Any]]:
    """Read one checkpoint folder. Raises ValueError where its content is not what was written.

    Sizes are compared with what was noted before anything is read; safetensors and JSON only, nothing is unpickled.
    """
    if (path / VALUES).stat().st_size > MAX_VALUES:
        raise ValueError(f"its {VALUES} is larger than any checkpoint's")
    record = json.loads((path / VALUES).read_text())
    if f"step-{record['step']:08d}" != path.name:
        raise ValueError("it is another step's")
    with (path / TENSORS).open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        if size != record["bytes"] or hashlib.file_digest(file, "sha256").hexdigest() != record["sha256"]:
            raise ValueError("its tensors differ from those that were written")
    with safe_open(path / TENSORS, "pt") as tensors:
        # Copies: views into the file lie at odd addresses, where some kernels round differently.
        read = {name: tensors.get_tensor(name).clone() for name in tensors.keys()}  # noqa: SIM118 - it is no dict
    return record["step"], unpack(record["state"], read)


def clear(folder: Path) -> None:
    """Remove all checkpoints: a run that starts anew must not be resumed from an older one's."""
    for path in checkpoints(folder):
        shutil.rmtree(path)
    for pattern in ("damaged-*", ".writing-*"):
        _remove(folder, pattern)


def checkpoints(folder: Path) -> list[Path]:
    """The checkpoint folders, oldest first."""
    return sorted(path for path in folder.glob("step-*") if _NAME.fullmatch(path.name) and path.is_dir())


def _write(path: Path, data: bytes) -> None:
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _place(temporary: Path, target: Path) -> Path:
    """Give a written folder its name, and make that name outlive a loss of power."""
    _sync(temporary)
    shutil.rmtree(target, ignore_errors=True)
    os.replace(temporary, target)
    _sync(target.parent)
    return target


def _sync(folder: Path) -> None:
    if os.name == "posix":  # elsewhere a folder cannot be opened
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _sweep(folder: Path) -> None:
    """Remove what processes of this machine left that were killed while they wrote; a live one may be writing."""
    mine = f".writing-{socket.gethostname()}-"
    for path in folder.glob(f"{mine}*"):
        pid = path.name.removeprefix(mine)
        if pid == str(os.getpid()) or not (pid.isdecimal() and psutil.pid_exists(int(pid))):
            shutil.rmtree(path, ignore_errors=True)


def _remove(folder: Path, pattern: str) -> None:
    for path in folder.glob(pattern):
        shutil.rmtree(path, ignore_errors=True)


def _unwritten(step: int, needed: int, error: OSError) -> TrainingFailed:
    before = "the checkpoints before it are whole, so training can go on from there"
    if error.errno in FULL:
        return TrainingFailed(
            f"The disk is full: the checkpoint of step {step} needs {needed / 1e6:.1f} MB. "
            f"Free some space and start the training again; {before}."
        )
    return TrainingFailed(f"The checkpoint of step {step} cannot be written ({error.strerror}); {before}.")
