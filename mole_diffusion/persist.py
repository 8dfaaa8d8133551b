"""Compositions as files: one safetensors with the gate's tensors and a JSON header. Read as a stranger's file."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mole_diffusion.errors import BaseMismatch, InvalidFile, InvalidRequest, MoleError
from mole_diffusion.experts.canonical import ROLES, Expert
from mole_diffusion.experts.inspect import HasShapes
from mole_diffusion.experts.load import content_sha256
from mole_diffusion.experts.peft_folder import WEIGHTS
from mole_diffusion.experts.safefile import MAX_BYTES, Source, read_bytes, read_header, read_tensors
from mole_diffusion.experts.save import write_safetensors
from mole_diffusion.gates.config import AnyGate, gate_from_json, gate_to_json

if TYPE_CHECKING:
    from mole_diffusion.composition import Composition

SCHEMA = "1"
SCHEMA_KEY = "mole.schema"
CONTENT_KEY = "mole.composition"
MAX_EXPERTS = 256


def save_composition(composition: Composition, path: str | Path) -> Path:
    """See :meth:`mole_diffusion.Composition.save`."""
    content = {
        "base": _base_name(composition),
        "prediction": getattr(composition.base, "prediction_type", None),
        "experts": [
            {"name": e.name, "sha256": e.sha256, "trigger": e.trigger, "role": e.role} for e in composition.experts
        ],
        "outside": [expert.name for expert in composition.plan.always if expert.role != "accelerator"],
        "gate": gate_to_json(composition.config),
        "recipe": composition.recipe,
    }
    metadata = {SCHEMA_KEY: SCHEMA, CONTENT_KEY: json.dumps(content, sort_keys=True)}
    return write_safetensors(composition.state_dict(), Path(path), metadata)


def read_composition_header(source: Source) -> dict[str, Any]:
    """What a composition file says: base, prediction type, experts (name, sha256, trigger, role), gate, recipe.

    Raises:
        InvalidFile: not a composition, damaged, or of a newer schema.
    """
    header = read_header(source, max_bytes=MAX_BYTES)
    if CONTENT_KEY not in header.metadata:
        raise InvalidFile("This safetensors file is not a saved composition: it names no experts and no gate.")
    if header.metadata.get(SCHEMA_KEY) != SCHEMA:
        raise InvalidFile(
            f"This composition has the schema {header.metadata.get(SCHEMA_KEY, 'none')[:20]!r}, this version reads "
            f"{SCHEMA!r}: update the program, or save the composition again."
        )
    try:
        content = json.loads(header.metadata[CONTENT_KEY])
    except (ValueError, RecursionError) as error:
        raise InvalidFile("The header of this composition is not JSON: the file is damaged.") from error
    _check_content(content)
    return content


def load_composition(
    path: Source,
    pipe: Any,
    experts_by_sha: Mapping[str, Expert] | str | Path,
    base: HasShapes | None = None,
) -> Composition:
    """Build a saved composition on a pipeline; not attached yet.

    Args:
        path: the file, or its bytes.
        pipe: as for :func:`mole_diffusion.compose`.
        experts_by_sha: content hash → expert, or a folder that holds the experts' files under any name.
        base: refuse compositions of another base.

    Raises:
        InvalidFile: damaged, hostile, or its tensors do not fit its own settings.
        InvalidRequest: experts are missing; names them.
        BaseMismatch: made for another base.
    """
    from mole_diffusion.composition import compose

    data = read_bytes(path)
    content = read_composition_header(data)
    if base is not None and content["base"] not in (None, base.family, getattr(base, "name", None)):
        raise BaseMismatch(f"This composition was made for {content['base']}, not for {base.title}.")
    prediction = getattr(base, "prediction_type", None)
    if base is not None and None not in (content["prediction"], prediction) and content["prediction"] != prediction:
        raise BaseMismatch(
            f"The gates of this composition were trained on a base that predicts {content['prediction']}, "
            f"{base.title} predicts {prediction}: choose the base they were trained on, or train new ones."
        )
    experts = _find_experts(content["experts"], experts_by_sha)
    try:
        config = gate_from_json(content["gate"])
    except InvalidRequest as error:
        raise InvalidFile(f"The gate of this composition is malformed: {error}") from error
    tensors = read_tensors(data)
    _check_tensors(pipe, experts, config, tensors, content["outside"])
    composition = compose(pipe, experts, gate=config, base=base, outside=content["outside"])
    composition.load_state_dict(tensors)
    composition.recipe = content["recipe"]
    return composition


def _check_tensors(
    pipe: Any, experts: list[Expert], config: AnyGate, tensors: Mapping[str, Tensor], outside: list[str]
) -> None:
    """Compare shapes with a gate that takes no memory: settings alone must not be able to ask for gigabytes."""
    from mole_diffusion.gates.make import build_gate
    from mole_diffusion.hosts import host_for
    from mole_diffusion.plan import build_plan

    plan = build_plan(host_for(pipe), experts, config.granularity, outside)
    with torch.device("meta"):
        gate = build_gate(plan, config)
    wanted = {key: tuple(value.shape) for key, value in gate.state_dict().items()}
    found = {key: tuple(value.shape) for key, value in tensors.items()}
    if wanted != found:
        odd = sorted(key for key in wanted.keys() | found.keys() if wanted.get(key) != found.get(key))
        raise InvalidFile(f"The gate tensors of this composition do not fit its experts and gate ({odd[0][:120]!r}).")


def _check_content(content: Any) -> None:
    expected = {
        "base": str | None, "prediction": str | None, "experts": list, "outside": list, "gate": dict, "recipe": dict
    }  # fmt: skip
    if isinstance(content, dict):
        content.setdefault("prediction", None)  # files of the first days do not say these two
        content.setdefault("outside", [])
    if not isinstance(content, dict) or set(content) != set(expected):
        raise InvalidFile("The header of this composition must hold base, experts, gate and recipe: it is damaged.")
    for field, kind in expected.items():
        if not isinstance(content[field], kind):
            raise InvalidFile(f"The field {field} of this composition's header has the wrong type: it is damaged.")
    if not 0 < len(content["experts"]) <= MAX_EXPERTS:
        raise InvalidFile(f"A composition has 1 to {MAX_EXPERTS} experts, this one names {len(content['experts'])}.")
    for expert in content["experts"]:
        texts = isinstance(expert, dict) and all(isinstance(expert.get(key), str) for key in ("name", "sha256", "role"))
        if not texts or not isinstance(expert.get("trigger"), str | None) or expert["role"] not in ROLES:
            raise InvalidFile("An expert in this composition's header is malformed: the file is damaged.")


def _find_experts(wanted: list[dict[str, Any]], source: Mapping[str, Expert] | str | Path) -> list[Expert]:
    known = source if isinstance(source, Mapping) else _load_folder(Path(source), {e["sha256"] for e in wanted})
    missing = [e for e in wanted if e["sha256"] not in known or known[e["sha256"]].sha256 != e["sha256"]]
    if missing:
        listed = ", ".join(f"{e['name']!r} (sha256 {e['sha256'][:12]}…)" for e in missing)
        raise InvalidRequest(f"This composition needs experts that are not here: {listed}. Add their files first.")
    return [replace(known[e["sha256"]], name=e["name"], trigger=e["trigger"], role=e["role"]) for e in wanted]


def _load_folder(folder: Path, wanted: set[str]) -> dict[str, Expert]:
    """Experts of a folder by content hash; only files with a wanted hash are opened."""
    found: dict[str, Expert] = {}
    files = [*folder.glob("*.safetensors"), *folder.glob(f"*/{WEIGHTS}")]  # folders of PEFT are experts too
    for file in sorted(files, key=lambda file: (file.stem not in wanted, str(file))):
        if len(found) == len(wanted):
            break
        digest = content_sha256(file)
        if digest in wanted:
            try:
                found[digest] = Expert.load(file)
            except MoleError as error:
                raise InvalidFile(f"{file.name} cannot be used: {error}") from error
    return found


def _base_name(composition: Composition) -> str | None:
    if composition.base is not None:
        return composition.base.family
    families = {expert.base for expert in composition.experts}
    return families.pop() if len(families) == 1 else None
