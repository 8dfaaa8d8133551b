"""``generate`` without trained gates: every method by its name, weights, regions."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from mole_diffusion.commands.generate import GenerateArguments, run_generate
from mole_diffusion.commands.methods import COMBINED, METHODS, choose, parse_regions
from mole_diffusion.errors import InvalidRequest
from mole_diffusion.experts.combine import COMBINE_METHODS
from mole_diffusion.gates.config import gate_to_json
from mole_diffusion.png import read_parameters
from tests.core.small import make_expert, make_sd

HALVES = ("robot=0,0,0.5,1", "bunny=0.5,0,1,1")


def run(out: Path, experts: tuple[str, ...] = ("robot", "bunny"), **more: Any) -> dict[str, Any]:
    asked = GenerateArguments(
        base="demo", experts=experts, composition=None, method=None, prompt="a zwx robot and a zwx bunny",
        negative="", seed=0, steps=1, guidance=None, count=1, width=None, height=None, out=out, device="cpu",
        scores=False,
    )  # fmt: skip
    return run_generate(replace(asked, **more))


def test_names_are_those_of_the_library() -> None:
    assert COMBINED == COMBINE_METHODS


@pytest.mark.parametrize("method", ["switch", "composite", "klora", "dare_ties"])
def test_every_kind_of_method_makes_a_picture(demo_assets: Path, tmp_path: Path, method: str) -> None:
    made = run(tmp_path, method=method)
    parameters = read_parameters(made["images"][0]["path"])
    assert made["method"] == parameters["method"] == method
    names = [entry["name"] for entry in parameters.get("combined", parameters["composition"]["experts"])]
    assert names == ["robot", "bunny"]


def test_weights_alone_mean_a_sum(demo_assets: Path, tmp_path: Path) -> None:
    made = run(tmp_path, weights=[0.8, 0.5])
    gate = made["parameters"]["composition"]["gate"]
    assert made["method"] == "sum" and gate["weights"] == [0.8, 0.5] and not gate["redistribute"]


@pytest.mark.parametrize("method", ["sum", None])
def test_regions_are_applied_and_recorded(demo_assets: Path, tmp_path: Path, method: str | None) -> None:
    placed, free = run(tmp_path, method=method, regions=HALVES), run(tmp_path, method=method)
    parameters = read_parameters(placed["images"][0]["path"])
    assert parameters["regions"] == {"robot": [0, 0, 0.5, 1], "bunny": [0.5, 0, 1, 1]}
    pictures = [Image.open(made["images"][0]["path"]).tobytes() for made in (placed, free)]
    assert pictures[0] != pictures[1]


@pytest.mark.parametrize(
    ("more", "reason"),
    [
        ({"method": "switch", "experts": ()}, "needs experts"),
        ({"weights": [1.0], "experts": ()}, "needs experts"),
        ({"regions": HALVES, "experts": ()}, "Regions need experts"),
        ({"method": "klora", "experts": ("robot",)}, "two experts"),
        ({"method": "spans", "weights": [1.0, 1.0]}, "finds its weights itself"),
        ({"method": "sum", "weights": [1.0]}, r"each of 2 experts \(robot, bunny\), got 1"),
        ({"method": "nla", "weights": [1.0, -1.0]}, "sum above 0"),
        ({"weights": [1.0, 1.0], "composition": Path("x.safetensors")}, "either --composition or --method"),
        ({"method": "ties", "regions": HALVES}, "one LoRA of all experts"),
        ({"method": "sum", "regions": ("cat=0,0,1,1",)}, "No expert is named 'cat'"),
        ({"method": "sum", "regions": ("robot=0,0,2,1",)}, "box"),
    ],
)
def test_what_a_method_needs_is_said(demo_assets: Path, tmp_path: Path, more: dict[str, Any], reason: str) -> None:
    with pytest.raises(InvalidRequest, match=reason):
        run(tmp_path, **more)
    assert not list(tmp_path.glob("*.png"))


@pytest.mark.parametrize("text", ["robot", "=0,0,1,1", "robot=0,0,1", "robot=a,b,c,d", "robot=0;0;1;1"])
def test_malformed_regions(text: str) -> None:
    with pytest.raises(InvalidRequest, match="NAME=left,top,right,bottom"):
        parse_regions([text])


def test_a_name_may_hold_an_equals_sign_but_no_second_region() -> None:
    assert parse_regions(["a=b=0,0,1,1"]) == {"a=b": (0.0, 0.0, 1.0, 1.0)}
    with pytest.raises(InvalidRequest, match="two regions"):
        parse_regions(["a=0,0,1,1", "a=0,0,1,1"])


@pytest.mark.parametrize("method", METHODS)
def test_accelerators_stay_beside(method: str) -> None:
    pipe = make_sd()
    robot, bunny = (make_expert(pipe, name, seed=i, targets=("to_q",)) for i, name in enumerate(("robot", "bunny")))
    quick = make_expert(pipe, "quick", seed=5, targets=("to_q",), role="accelerator")
    experts, gate = choose([robot, quick, bunny], method, None if method in ("spans", "klora") else [0.5, 1.5])
    names = ["robot+bunny", "quick"] if method in COMBINED else ["robot", "quick", "bunny"]
    assert [expert.name for expert in experts] == names
    if method == "nla":
        assert gate_to_json(gate)["weights"] == (0.25, 0.75)
