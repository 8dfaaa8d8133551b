"""Saved compositions: identical pictures, and files that cannot be trusted."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save

from mole_diffusion import Expert, GateConfig, TriggerSpans, compose, load_composition
from mole_diffusion.composition import Composition, learned_static, nla
from mole_diffusion.errors import BaseMismatch, InvalidFile, InvalidRequest
from mole_diffusion.experts import inspect_file, save_expert
from mole_diffusion.persist import read_composition_header
from tests.core.small import SD_TARGETS, generate, make_expert, make_sdxl, randomise, shapes_of

GATES: dict[str, Any] = {
    "sample": GateConfig(),
    "token": GateConfig(scope="token", scale="null", gain=True, text_prior=1.0),
    "static": nla(2),
    "learned static": learned_static(2),
    "spans": TriggerSpans(),
}


class Base:
    """What a composition asks of a base."""

    title, family, name = "tiny", "demo", "demo"

    def __init__(self, pipe: Any) -> None:
        self.shapes = shapes_of(pipe)

    def module_shapes(self) -> dict[str, tuple[int, ...]]:
        return self.shapes


def stored(pipe: Any, folder: Path) -> list[Expert]:
    """Two experts that live in files."""
    experts = []
    for seed, name in enumerate(("robot", "bunny")):
        made = make_expert(pipe, name, seed=seed, targets=(*SD_TARGETS, "fc1"), rank=seed + 2, base="demo", size=0.1)
        experts.append(Expert.load(save_expert(made, folder / f"{name}.safetensors")))
    return experts


def saved(pipe: Any, folder: Path, gate: Any = None) -> tuple[Composition, Path]:
    composition = compose(pipe, stored(pipe, folder), gate=gate)
    randomise(composition)
    composition.recipe = {"steps": 3}
    return composition, composition.save(folder / "robot+bunny" / "gate.safetensors")


@pytest.mark.parametrize("gate", GATES)
def test_saved_and_loaded_is_identical(pipe: Any, gate: str, tmp_path: Path) -> None:
    composition, path = saved(pipe, tmp_path, GATES[gate])
    with composition:
        before = generate(pipe)
    again = load_composition(path, pipe, tmp_path)
    assert not again.attached and again.config == composition.config and again.recipe == {"steps": 3}
    assert again.names == ("robot", "bunny")
    with again:
        assert torch.equal(generate(pipe), before)
    by_hash = {expert.sha256: expert for expert in composition.experts}
    with load_composition(path.read_bytes(), pipe, by_hash):
        assert torch.equal(generate(pipe), before)
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_header(sd: Any, tmp_path: Path) -> None:
    composition, path = saved(sd, tmp_path)
    header = read_composition_header(path)
    assert header["base"] == "demo" and header["gate"]["kind"] == "learned"
    assert [expert["sha256"] for expert in header["experts"]] == [expert.sha256 for expert in composition.experts]
    assert "saved composition" in inspect_file(path).reason


def test_names_of_the_composition_win_over_file_names(sd: Any, tmp_path: Path) -> None:
    _, path = saved(sd, tmp_path)
    (tmp_path / "robot.safetensors").rename(tmp_path / "0123.safetensors")
    assert load_composition(path, sd, tmp_path).names == ("robot", "bunny")


def test_missing_experts_are_named(sd: Any, tmp_path: Path) -> None:
    composition, path = saved(sd, tmp_path)
    (tmp_path / "bunny.safetensors").unlink()
    with pytest.raises(InvalidRequest, match=f"'bunny' \\(sha256 {composition.experts[1].sha256[:12]}"):
        load_composition(path, sd, tmp_path)
    with pytest.raises(InvalidRequest, match=r"'robot'.*'bunny'"):
        load_composition(path, sd, {})
    swapped = {composition.experts[0].sha256: composition.experts[1]}
    with pytest.raises(InvalidRequest, match="'robot'"):
        load_composition(path, sd, swapped)


def test_changed_expert_file_is_not_the_same_expert(sd: Any, tmp_path: Path) -> None:
    _, path = saved(sd, tmp_path)
    save_expert(make_expert(sd, "bunny", seed=9), tmp_path / "bunny.safetensors")
    with pytest.raises(InvalidRequest, match="'bunny'"):
        load_composition(path, sd, tmp_path)


def test_another_base(sd: Any, tmp_path: Path) -> None:
    composition, path = saved(sd, tmp_path)
    assert load_composition(path, sd, tmp_path, Base(sd)).base is not None
    other = Base(sd)
    other.family = other.name = "sdxl"
    with pytest.raises(BaseMismatch, match="made for demo"):
        load_composition(path, sd, tmp_path, other)
    with pytest.raises(BaseMismatch, match="does not fit"):
        load_composition(path, make_sdxl(), tmp_path)
    with pytest.raises(BaseMismatch, match="does not fit tiny"):
        compose(sd, composition.experts, base=Base(make_sdxl()))


def test_gates_of_another_prediction_type(sd: Any, tmp_path: Path) -> None:
    trained, used = Base(sd), Base(sd)
    trained.prediction_type, used.prediction_type = "v_prediction", "epsilon"  # type: ignore[attr-defined]
    path = compose(sd, stored(sd, tmp_path), base=trained).save(tmp_path / "c.safetensors")
    assert load_composition(path, sd, tmp_path, trained).names == ("robot", "bunny")
    with pytest.raises(BaseMismatch, match="predicts v_prediction, tiny predicts epsilon"):
        load_composition(path, sd, tmp_path, used)


def content(**changes: Any) -> dict[str, Any]:
    experts = [{"name": "a", "sha256": "0", "trigger": None, "role": "subject"}]
    return {"base": None, "experts": experts, "gate": {"kind": "learned"}, "recipe": {}, **changes}


BAD_HEADERS: dict[str, Any] = {
    "not json": "{",
    "a list": "[]",
    "missing field": json.dumps({"base": None}),
    "extra field": json.dumps(content(command="rm")),
    "base is a number": json.dumps(content(base=1)),
    "no experts": json.dumps(content(experts=[])),
    "many experts": json.dumps(content(experts=content()["experts"] * 300)),
    "expert is text": json.dumps(content(experts=["a"])),
    "trigger is a list": json.dumps(content(experts=[{"name": "a", "sha256": "0", "trigger": [], "role": "x"}])),
    "deep": '{"a":' + "[" * 100_000 + "}",
}


@pytest.mark.parametrize("case", BAD_HEADERS)
def test_hostile_headers(case: str) -> None:
    file = save({"a": torch.ones(1)}, {"mole.schema": "1", "mole.composition": BAD_HEADERS[case]})
    with pytest.raises(InvalidFile):
        read_composition_header(file)


def test_other_files_and_newer_schemas() -> None:
    with pytest.raises(InvalidFile, match="not a saved composition"):
        read_composition_header(save({"a": torch.ones(1)}))
    newer = save({"a": torch.ones(1)}, {"mole.schema": "2", "mole.composition": "{}"})
    with pytest.raises(InvalidFile, match="schema '2'"):
        read_composition_header(newer)
    with pytest.raises(InvalidFile, match="empty"):
        read_composition_header(b"")


@pytest.mark.parametrize(
    "gate", [{"kind": "learned", "hidden": 10**7}, {"kind": "x"}, {"kind": "learned", "hidden": 63}, {"kind": "static"}]
)
def test_gate_settings_that_do_not_fit_the_tensors(sd: Any, tmp_path: Path, gate: dict[str, Any]) -> None:
    composition, _ = saved(sd, tmp_path)
    header = read_composition_header(tmp_path / "robot+bunny" / "gate.safetensors")
    header["gate"] = gate
    file = save(composition.state_dict(), {"mole.schema": "1", "mole.composition": json.dumps(header)})
    with pytest.raises(InvalidFile):
        load_composition(file, sd, tmp_path)


def test_role_of_a_hostile_file(sd: Any, tmp_path: Path) -> None:
    composition, path = saved(sd, tmp_path)
    header = read_composition_header(path)
    header["experts"][0]["role"] = "root"
    file = save(composition.state_dict(), {"mole.schema": "1", "mole.composition": json.dumps(header)})
    with pytest.raises(InvalidFile, match="malformed"):
        load_composition(file, sd, tmp_path)
