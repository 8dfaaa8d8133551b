"""Gates that begin where the gates of some of the same experts ended, in any order, and file-to-file reordering.

What a gate holds per expert is a row of its last layer (or a column of the static table); the rest is shared. Rows go
by the experts' hashes. A new expert starts at the mean of the known ones: its share is then like that of an equal, and
with it masked the gates are those that were loaded.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mole_diffusion.errors import InvalidRequest
from mole_diffusion.experts import read_tensors
from mole_diffusion.experts.save import write_safetensors
from mole_diffusion.functional import sigmoid_gate
from mole_diffusion.gates import GateConfig, StaticWeights
from mole_diffusion.gates.config import AnyGate, gate_from_json
from mole_diffusion.persist import CONTENT_KEY, SCHEMA, SCHEMA_KEY, read_composition_header

if TYPE_CHECKING:
    from mole_diffusion import Composition

Rows = Sequence[int | None]
"""For each expert now, its number among the experts before; None: a new one."""


def warm_start(composition: Composition, path: Path) -> tuple[str, ...]:
    """Put the gates of a saved composition into this one; names of the experts that it knew.

    Raises:
        InvalidFile: not a composition.
        InvalidRequest: it knows none of these experts, or its gates are of another kind or for other blocks.
    """
    header = read_composition_header(path)
    before = [
        e["sha256"] for e in header["experts"] if e["role"] != "accelerator" and e["name"] not in header["outside"]
    ]
    gated = composition.plan.gated
    rows = [before.index(expert.sha256) if expert.sha256 in before else None for expert in gated]
    known = tuple(expert.name for expert, row in zip(gated, rows, strict=True) if row is not None)
    if not known:
        raise InvalidRequest(
            f"{path.name} holds gates of {_listed(header)}, none of which is composed here; leave out the warm start."
        )
    family = getattr(composition.base, "family", None)
    if None not in (family, header["base"]) and family != header["base"]:
        raise InvalidRequest(f"{path.name} was made for {header['base']}, and these gates are for {family}.")
    _check_alike(gate_from_json(header["gate"]), composition.config, path.name)
    start, loaded = composition.state_dict(), read_tensors(path)
    found = regrown(loaded, rows, composition.config)
    odd = sorted(key for key in found if key in start and found[key].shape != start[key].shape)
    shared = {key: value for key, value in found.items() if key in start}
    if odd or not shared:
        raise InvalidRequest(f"{path.name} has gates for other blocks than these experts; leave out the warm start.")
    composition.load_state_dict({**start, **shared})
    return known


def regrown(tensors: Mapping[str, Tensor], rows: Rows, config: AnyGate) -> dict[str, Tensor]:
    """A gate's tensors for other experts: ``rows`` says where each of them was before."""
    found = {}
    for key, value in tensors.items():
        if key == "table":
            found[key] = _columns(value, rows)
        elif key.endswith((".up.weight", ".up.bias")):
            null = isinstance(config, GateConfig) and config.scale == "null"
            found[key] = _grown(value, rows, null)
            if key.endswith(".bias") and isinstance(config, GateConfig) and config.scale == "sigmoid":
                tau = tensors[key.replace(".up.bias", ".log_tau")].exp()
                found[key] = found[key] + tau * _start_gap(len(value), rows)
        else:
            found[key] = value
    return found


def reorder(path: Path, experts: Sequence[Mapping[str, Any]], out: Path) -> None:
    """Write a saved composition of the same experts in another order, and with these names.

    Args:
        experts: name, sha256, trigger and role of each, as in a composition's header.

    Raises:
        InvalidRequest: the file holds other experts.
    """
    content = read_composition_header(path)
    before = [expert["sha256"] for expert in content["experts"]]
    wanted = [expert["sha256"] for expert in experts]
    if sorted(before) != sorted(wanted) or content["outside"]:
        raise InvalidRequest(f"{path.name} holds {_listed(content)} and cannot serve other experts.")
    tensors = regrown(read_tensors(path), [before.index(sha) for sha in wanted], gate_from_json(content["gate"]))
    content["experts"] = [dict(expert) for expert in experts]
    metadata = {SCHEMA_KEY: SCHEMA, CONTENT_KEY: json.dumps(content, sort_keys=True)}
    write_safetensors(tensors, out, metadata)


def _grown(value: Tensor, rows: Rows, null: bool) -> Tensor:
    """Rows (N, …) of the last layer, new ones the mean of those known; a null expert's row stays last."""
    mean = torch.stack([value[row] for row in rows if row is not None]).mean(0)
    return torch.stack([*(mean if row is None else value[row] for row in rows), *([value[-1]] if null else [])])


def _columns(table: Tensor, rows: Rows) -> Tensor:
    """Columns (M, N) of static weights. The known ones give a new one its part, so that the total stays as it was."""
    kept = table[:, [row for row in rows if row is not None]]
    mean = kept.mean(1, keepdim=True)
    share = table.sum(1, keepdim=True) / (kept.sum(1, keepdim=True) + sum(row is None for row in rows) * mean)
    columns = torch.cat([mean if row is None else table[:, row : row + 1] for row in rows], 1)
    return columns if len(kept[0]) == len(rows) == len(table[0]) else columns * share


def _start_gap(before: int, rows: Rows) -> Tensor:
    """(N,) what known experts' logits need, since independent gates of more experts start lower (1/N at logit 0)."""
    one, other = (sigmoid_gate(torch.zeros(count)).logit()[0] for count in (before, len(rows)))
    return torch.tensor([0.0 if row is None else float(one - other) for row in rows])


def _check_alike(before: AnyGate, now: AnyGate, name: str) -> None:
    """Raise where the gates differ in more than the number of experts, or hold more per expert than a row."""
    if isinstance(before, StaticWeights) and isinstance(now, StaticWeights):
        before = replace(before, weights=now.weights)
    plain = isinstance(now, GateConfig) and now.input == "hidden"
    if not plain and not (isinstance(now, StaticWeights) and now.learnable):
        raise InvalidRequest("Only gates that look at hidden states, and learned static weights, can start warm.")
    if type(before) is not type(now):
        raise InvalidRequest(f"{name} holds gates of another kind than these; leave out the warm start.")
    one, two = asdict(before), asdict(now)
    odd = next((key for key in two if one[key] != two[key]), None)
    if odd is not None:
        raise InvalidRequest(
            f"{name} holds gates with {odd} {one[odd]!r}, these have {two[odd]!r}: train with the same settings."
        )


def _listed(header: Mapping[str, Any]) -> str:
    return ", ".join(expert["name"] for expert in header["experts"])
