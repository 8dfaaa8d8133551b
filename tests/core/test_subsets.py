"""Each row of a batch with experts of its own (RAMoLE's mapping matrix) is that row alone under its own mask."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from mole_diffusion import Composition, GateConfig, RouterConfig, StaticWeights, TriggerSpans, compose
from mole_diffusion.composition import nla
from mole_diffusion.errors import InvalidRequest
from tests.core.small import (
    CONV_TARGETS,
    HOSTS,
    OUTSIDE_TARGETS,
    SD_TARGETS,
    generate,
    make_expert,
    make_sd,
    randomise,
    run_model,
)

NAMES = ("robot", "bunny", "cat")
SUBSETS = [["robot"], ["bunny", "cat"], []]
GATES: dict[str, Any] = {
    "nla": nla(3),
    "token null": GateConfig(scope="token", scale="null"),
    "sample sigmoid": GateConfig(scale="sigmoid", gain=True),
    "energy layer": GateConfig(input="energy", granularity="layer", scope="token"),
    "outputs": GateConfig(input="expert_outputs"),
    "network": GateConfig(granularity="network"),
    "router": RouterConfig(rank=3),
    "spans": TriggerSpans(),
    "own": GateConfig(scope="token", guidance_rows="own"),
}
TABLE = [("sd", gate) for gate in GATES] + [("pixart", "token null"), ("sd3", "token null")]


def composed(pipe: Any, gate: Any) -> Composition:
    targets = SD_TARGETS + CONV_TARGETS + OUTSIDE_TARGETS + ("q_proj", "conv", "head.0")
    experts = [
        make_expert(pipe, name, rank=rank, seed=rank, targets=targets, size=0.1) for rank, name in enumerate(NAMES, 1)
    ]
    composition = compose(pipe, experts, gate=gate)
    randomise(composition)
    return composition


def alone(composition: Composition, row: int, rows: int, subset: list[str]) -> Tensor:
    """Row ``row`` of a batch in which every row has this mask."""
    composition.use_subsets(None)
    composition.mask(*(name for name in NAMES if name not in subset))
    found = run_model(composition.pipe, rows)[row]
    composition.unmask()
    return found


@pytest.mark.parametrize(("host", "gate"), TABLE)
@pytest.mark.parametrize("guidance", [False, True])
@torch.no_grad()
def test_a_row_is_what_it_is_alone(host: str, gate: str, guidance: bool) -> None:
    composition = composed(HOSTS[host](), GATES[gate])
    rows = 6 if guidance else 3
    with composition:
        composition.condition(["a robot", "a bunny", "a cat"], guidance=guidance, subsets=SUBSETS)
        batch = run_model(composition.pipe, rows)
        for row in range(rows):
            expected = alone(composition, row, rows, SUBSETS[row % 3])
            torch.testing.assert_close(batch[row], expected, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_bare_modules_and_static_weights() -> None:
    composition = composed(HOSTS["module"](), StaticWeights((0.2, 0.3, 0.5)))
    with composition:
        composition.use_subsets(SUBSETS)
        batch = run_model(composition.pipe, 3)
        for row, subset in enumerate(SUBSETS):
            expected = alone(composition, row, 3, subset)
            torch.testing.assert_close(batch[row], expected, rtol=1e-5, atol=1e-5)


def test_through_the_pipeline_with_several_pictures_per_prompt() -> None:
    pipe = make_sd()
    composition = composed(pipe, GateConfig(scope="token"))
    prompts = ["a robot", "a bunny"]
    with composition:
        composition.use_subsets([["robot"], ["bunny"]])
        both = generate(pipe, prompts, num_images_per_prompt=2)
        record = next(r for name, r in composition._context.records.items() if not name.endswith(":text"))
        assert record.probabilities.shape[0] == 4
        assert not record.probabilities[:2, :, 1:].any() and not record.probabilities[2:, :, [0, 2]].any()
        composition.use_subsets(None)
        composition.mask("bunny", "cat")
        # text encoders have no rows of their own: they keep all experts under subsets
        assert not torch.allclose(generate(pipe, prompts, num_images_per_prompt=2)[:2], both[:2], atol=1e-3)
    only = [make_expert(pipe, name, seed=seed, size=0.1) for seed, name in enumerate(("robot", "bunny"), 1)]
    composition = compose(pipe, only, gate=GateConfig(scope="token"))
    randomise(composition)
    with composition:
        composition.use_subsets([["robot"], ["bunny"]])
        both = generate(pipe, prompts, num_images_per_prompt=2)
        composition.use_subsets(None)
        for place, name in enumerate(("bunny", "robot")):
            composition.mask(name)
            rows = slice(2 * place, 2 * place + 2)
            expected = generate(pipe, prompts, num_images_per_prompt=2)[rows]
            torch.testing.assert_close(both[rows], expected, rtol=1e-4, atol=1e-4)
            composition.unmask()


def test_what_does_not_fit_is_refused() -> None:
    composition = composed(make_sd(), nla(3))
    with pytest.raises(InvalidRequest, match="No expert is named 'dog'"):
        composition.use_subsets([["dog"]])
    with composition, torch.no_grad():
        composition.use_subsets(SUBSETS[:2])
        with pytest.raises(InvalidRequest, match="for 2 prompts, but 3 rows came"):
            run_model(composition.pipe, 3)
        with pytest.raises(InvalidRequest, match="subsets"):
            composition.merge()
        composition.use_subsets(None)
        composition.merge()
        with pytest.raises(InvalidRequest, match="unmerge"):
            composition.use_subsets(SUBSETS)
