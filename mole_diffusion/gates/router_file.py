"""A trained router as a file of its own: one safetensors with its tensors, no experts. Read as a stranger's file."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from mole_diffusion.errors import BaseMismatch, InvalidFile, InvalidRequest
from mole_diffusion.experts.safefile import MAX_BYTES, Source, read_bytes, read_header, read_tensors
from mole_diffusion.experts.save import write_safetensors
from mole_diffusion.gates.config import RouterConfig, gate_from_json, gate_to_json
from mole_diffusion.gates.router import RouterGates, TrainedRouter

SCHEMA = "1"
SCHEMA_KEY = "mole.schema"
CONTENT_KEY = "mole.router"
_NAME = re.compile(r"routers\.([^.]+)\.(a|b|log_tau)")


@dataclass(frozen=True)
class RouterHeader:
    """What a router's file says: base family and prediction type (None = not said), settings, how it was trained."""

    base: str | None
    prediction: str | None
    gate: RouterConfig
    recipe: dict[str, Any] = field(default_factory=dict)


def save_router(
    router: RouterGates, path: str | Path, base: Any = None, recipe: Mapping[str, Any] | None = None
) -> Path:
    """Write a router atomically; ``base``: the base that it learned on; ``recipe``: how, JSON values."""
    content = {
        "base": getattr(base, "family", None),
        "prediction": getattr(base, "prediction_type", None),
        "gate": gate_to_json(router.config),
        "recipe": dict(recipe or {}),
    }
    metadata = {SCHEMA_KEY: SCHEMA, CONTENT_KEY: json.dumps(content, sort_keys=True)}
    return write_safetensors(router.state_dict(), Path(path), metadata)


def read_router_header(source: Source) -> RouterHeader:
    """What the file says of itself.

    Raises:
        InvalidFile: not a router, damaged, or of a newer schema.
    """
    header = read_header(source, max_bytes=MAX_BYTES)
    if CONTENT_KEY not in header.metadata:
        raise InvalidFile("This safetensors file is not a trained router: its header names none.")
    if header.metadata.get(SCHEMA_KEY) != SCHEMA:
        raise InvalidFile(
            f"This router has the schema {header.metadata.get(SCHEMA_KEY, 'none')[:20]!r}, this version reads "
            f"{SCHEMA!r}: update the program, or train the router again."
        )
    try:
        content = json.loads(header.metadata[CONTENT_KEY])
    except (ValueError, RecursionError) as error:
        raise InvalidFile("The header of this router is not JSON: the file is damaged.") from error
    return _checked(content)


def load_router(path: Source, base: Any = None) -> TrainedRouter:
    """A trained router, for ``compose(pipe, experts, gate=load_router(path))`` with any experts of its base.

    Args:
        path: the file, or its bytes.
        base: refuse a router of another base.

    Raises:
        InvalidFile: damaged, hostile, or its tensors do not fit its own settings.
        BaseMismatch: trained on another base.
    """
    data = read_bytes(path)
    header = read_router_header(data)
    if base is not None and header.base not in (None, base.family, getattr(base, "name", None)):
        raise BaseMismatch(f"This router was trained on {header.base}, not on {base.title}: train one on this base.")
    prediction = getattr(base, "prediction_type", None)
    if base is not None and None not in (header.prediction, prediction) and header.prediction != prediction:
        raise BaseMismatch(
            f"This router was trained on a base that predicts {header.prediction}, {base.title} predicts {prediction}: "
            "choose the base that it was trained on, or train another."
        )
    tensors = read_tensors(data)
    _check_tensors(tensors, header.gate.rank)
    return TrainedRouter(header.gate, tensors)


def _checked(content: Any) -> RouterHeader:
    kinds = {"base": str | None, "prediction": str | None, "gate": dict, "recipe": dict}
    whole = isinstance(content, dict) and content.keys() == kinds.keys()
    if not whole or not all(isinstance(content[key], kind) for key, kind in kinds.items()):
        raise InvalidFile("The header of this router must hold base, prediction, gate and recipe: it is damaged.")
    try:
        gate = gate_from_json(content["gate"])
    except InvalidRequest as error:
        raise InvalidFile(f"The settings of this router are malformed: {error}") from error
    if not isinstance(gate, RouterConfig):
        raise InvalidFile("The settings in this file are those of another kind of gate, not of a router.")
    return RouterHeader(content["base"], content["prediction"], gate, content["recipe"])


def _check_tensors(tensors: Mapping[str, Tensor], rank: int) -> None:
    found: dict[str, dict[str, tuple[int, ...]]] = {}
    for name, tensor in tensors.items():
        match = _NAME.fullmatch(name)
        if match is None:
            raise InvalidFile(f"A router has no tensor {name[:80]!r}: the file is damaged.")
        found.setdefault(match[1], {})[match[2]] = tuple(tensor.shape)
    for path, shapes in found.items():
        a, b = shapes.get("a", ()), shapes.get("b", ())
        if len(a) != 2 or len(b) != 2 or (a[0], b[1]) != (rank, rank) or shapes.get("log_tau") != ():
            raise InvalidFile(f"The tensors of {path[:80]!r} do not make a router of rank {rank}: the file is damaged.")
    if not found:
        raise InvalidFile("This router has no tensors: the file is damaged.")
