"""Gates learn from the language model's loss, gates alone, and find out which expert a prompt needs."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from mole_diffusion import Expert, GateConfig, StaticWeights, compose
from mole_diffusion.composition import nla
from mole_diffusion.errors import InvalidRequest
from mole_diffusion.text import from_peft, train_gates
from tests.text.skills import TASKS, WIDTH, batch_of, skilled
from tests.text.small import MAKERS, batch, peft_model, randomise
from tests.text.test_contract import GATES


@pytest.mark.parametrize("gate", GATES)
def test_gradients_reach_every_gate_parameter_and_no_other(
    model: Any, kind: str, experts: list[Expert], gate: str
) -> None:
    other = from_peft(peft_model(kind, 2, rank=3), "other")  # with the same targets: else there is nothing to weigh
    composition = compose(model, [experts[0], other], gate=GATES[gate])
    randomise(composition, size=0.3)
    with composition:
        composition.train()
        loss = model(**batch(kind, answers=True)).loss
        (loss + composition.balance_loss()).backward()
    for name, parameter in composition.gate.named_parameters():
        if not name.endswith(".span"):  # without triggers nobody asks for it
            assert parameter.grad is not None and parameter.grad.abs().max() > 0, name
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("gate", ["sample", "energy"])
def test_checkpointing_changes_no_gradient(kind: str, experts: list[Expert], gate: str) -> None:
    model = MAKERS[kind](dropout_rate=0.0) if kind == "t5" else MAKERS[kind]()
    composition = compose(model, experts, gate=GATES[gate])
    randomise(composition, size=0.3)
    found = []
    for checkpoints in (False, True):
        model.train()
        if checkpoints:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        with composition:
            composition.train()
            model(**batch(kind, answers=True), use_cache=False).loss.backward()
        found.append([parameter.grad.clone() for parameter in composition.parameters()])  # type: ignore[union-attr]
        composition.gate.zero_grad()
    for plain, again in zip(*found, strict=True):
        torch.testing.assert_close(plain, again)


def test_training_is_deterministic_and_leaves_the_model_alone(model: Any, kind: str, experts: list[Expert]) -> None:
    batches = [batch(kind, answers=True, seed=seed) for seed in range(3)]
    before, runs, seen = {k: v.clone() for k, v in model.state_dict().items()}, [], []
    for _ in range(2):
        torch.manual_seed(0)
        composition = compose(model, experts, gate=GATES["token"])
        losses = train_gates(
            composition, batches, steps=5, lr=1e-2, balance=0.5, seed=4, progress=lambda step, _: seen.append(step)
        )
        runs.append((losses, composition.state_dict()))
        assert not composition.attached and not model.training
    assert seen == [1, 2, 3, 4, 5] * 2 and runs[0][0] == runs[1][0]
    assert all(torch.equal(runs[0][1][key], runs[1][1][key]) for key in runs[0][1])
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_training_through_the_outputs_of_every_expert(model: Any, kind: str, experts: list[Expert]) -> None:
    composition = compose(model, experts, gate=GateConfig(input="expert_outputs", timestep=False))
    before = {key: value.clone() for key, value in composition.state_dict().items()}
    losses = train_gates(composition, [batch(kind, answers=True)], steps=8, lr=1e-2)
    assert losses[-1] < losses[0]
    assert any(not torch.equal(value, before[key]) for key, value in composition.state_dict().items())


def test_training_refuses(model: Any, kind: str, experts: list[Expert]) -> None:
    with pytest.raises(InvalidRequest, match="nothing to learn"):
        train_gates(compose(model, experts, gate=nla(2)), [batch(kind, answers=True)], steps=1)
    with pytest.raises(InvalidRequest, match="labels in each"):
        train_gates(compose(model, experts), [batch(kind)], steps=1)


@pytest.mark.parametrize("granularity", ["block", "network"])
def test_gates_recover_which_expert_a_prompt_needs(kind: str, granularity: Any, skills: list[Expert]) -> None:
    base = MAKERS[kind](layers=1, width=WIDTH)
    random = torch.Generator().manual_seed(9)
    held_out = [batch_of(kind, torch.full((64,), task), random) for task in TASKS]
    oracle, uniform, learned, right = [], [], [], []
    with torch.no_grad():
        for task, given in enumerate(held_out):
            with compose(base, skills, gate=StaticWeights([float(i == task) for i in TASKS])):
                oracle.append(float(base(**given).loss))
            with compose(base, skills, gate=nla(2)):
                uniform.append(float(base(**given).loss))
    torch.manual_seed(0)
    composition = compose(base, skills, gate=GateConfig(granularity=granularity, timestep=False))
    batches = [batch_of(kind, torch.arange(32) % 2, random) for _ in range(16)]
    train_gates(composition, batches, steps=70 if granularity == "block" else 40, lr=3e-2)
    with composition, torch.no_grad():
        for task, given in enumerate(held_out):
            composition.condition(None, guidance=False)
            learned.append(float(base(**given).loss))
            weights = composition.trace().weights.values()
            right.append(sum(steps[0][task] for steps in weights) / len(weights))
    assert min(uniform) > 1.0 and max(oracle) < 0.4
    assert min(right) > 0.9, right
    assert all(loss < best + 0.05 for loss, best in zip(learned, oracle, strict=True)), (learned, oracle)


@pytest.fixture(scope="module")
def skills(kind: str) -> list[Expert]:
    return [skilled(kind, task) for task in TASKS]
