"""Gradients reach the gates and only the gates, and training finds gates that are known to be optimal."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mole_diffusion import GateConfig, compose
from mole_diffusion.composition import learned_static
from mole_diffusion.experts import LowRank
from mole_diffusion.gates import BlockGate
from mole_diffusion.layers import ExpertBank, compose_layer
from tests.core.small import CONV_TARGETS, OUTSIDE_TARGETS, SD_TARGETS, make_expert, randomise, run_unet

TARGETS = SD_TARGETS + CONV_TARGETS + OUTSIDE_TARGETS
LEARNED: dict[str, Any] = {
    "sample": GateConfig(gain=True),
    "sample null": GateConfig(scale="null"),
    "token": GateConfig(scope="token"),
    "token null gain": GateConfig(scope="token", scale="null", gain=True),
    "token sigmoid": GateConfig(scope="token", scale="sigmoid"),
    "static": learned_static(2),
}


def composed(pipe: Any, gate: Any) -> Any:
    experts = [
        make_expert(pipe, "robot", seed=1, targets=TARGETS, size=0.1),
        make_expert(pipe, "bunny", seed=2, targets=TARGETS, size=0.1, rank=3),
    ]
    return compose(pipe, experts, gate=gate)


def gradients(composition: Any) -> list[Tensor]:
    found = [parameter.grad.clone() for parameter in composition.parameters()]
    composition.gate.zero_grad()
    return found


@pytest.mark.parametrize("gate", LEARNED)
def test_every_gate_parameter_gets_a_gradient_and_no_base_parameter(pipe: Any, gate: str) -> None:
    composition = composed(pipe, LEARNED[gate])
    randomise(composition)
    with composition.train():
        composition.condition(["a robot", "a bunny"], guidance=False)
        (run_unet(pipe).square().mean() + 0.5 * composition.balance_loss()).backward()
    for name, parameter in composition.gate.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
        if name != "table":
            assert parameter.grad.abs().sum() > 0, name
    assert all(parameter.grad is None for parameter in pipe.unet.parameters())


@pytest.mark.parametrize("gate", ["sample", "token null gain", "static"])
def test_gradient_checkpointing_changes_nothing(pipe: Any, gate: str) -> None:
    composition = composed(pipe, LEARNED[gate])
    randomise(composition)
    results = []
    with composition.train():
        composition.condition(["a robot", "a bunny"], guidance=False)
        for checkpointing in (False, True):
            if checkpointing:
                pipe.unet.enable_gradient_checkpointing()
                pipe.unet.train()
            loss = run_unet(pipe).square().mean() + 0.5 * composition.balance_loss()
            loss.backward()
            results.append((loss.detach(), gradients(composition)))
    torch.testing.assert_close(results[0][0], results[1][0])
    for plain, again in zip(results[0][1], results[1][1], strict=True):
        torch.testing.assert_close(plain, again, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("gate", ["sample", "token", "static"])
def test_balance_loss_of_a_uniform_gate(pipe: Any, gate: str) -> None:
    composition = composed(pipe, LEARNED[gate])
    with composition:
        composition.condition(["a robot", "a bunny"], guidance=False)
        run_unet(pipe)
        torch.testing.assert_close(composition.balance_loss(), torch.tensor(2 * math.log(2)))
        run_unet(pipe)
        composition.mask("robot")
        run_unet(pipe)
        torch.testing.assert_close(composition.balance_loss(), torch.tensor(0.0), atol=1e-6, rtol=0)


def test_balance_loss_over_subject_places(sd: Any) -> None:
    """Exclusive on the subjects, alike elsewhere: only the subjects' places count."""
    composition = composed(sd, GateConfig(scope="token"))
    with composition, torch.no_grad():
        composition.condition(["a robot", "a bunny"], guidance=False)
        run_unet(sd)
        mask = torch.zeros(2, 8, 8)
        mask[0, :, :4] = 1
        torch.testing.assert_close(composition.balance_loss(mask), torch.tensor(2 * math.log(2)))
        randomise(composition)
        run_unet(sd)
        everywhere = composition.balance_loss()
        assert not torch.allclose(composition.balance_loss(mask), everywhere)
        torch.testing.assert_close(
            composition.balance_loss(torch.ones(2, 32, 32)), composition.balance_loss(torch.ones(2, 8, 8))
        )


def test_temperature_is_learned() -> None:
    gate = BlockGate(8, 3, GateConfig(temperature=2.0))
    assert math.isclose(float(gate.log_tau.detach().exp()), 2.0, rel_tol=1e-6)
    x = torch.randn(2, 5, 8)
    gate(x, pool=True).square().sum().backward()
    assert gate.log_tau.grad == 0
    nn.init.normal_(gate.up.weight)
    gate(x, pool=True).square().sum().backward()
    assert gate.log_tau.grad != 0


class Gated:
    """One layer weighed by one block gate, as in a block."""

    def __init__(self, gate: BlockGate, pool: bool) -> None:
        self.gate = gate
        self.pool = pool

    def weights(self, layer: Any, x: Tensor) -> Tensor | None:
        return self.gate(x, pool=self.pool)


@pytest.mark.parametrize("scale", ["softmax", "null", "sigmoid"])
@pytest.mark.parametrize("scope", ["token", "sample"])
def test_known_optimal_gates_are_recovered(scope: Any, scale: Any) -> None:
    """Tokens (or rows) of kind a want expert 0, those of kind b expert 1; every other weight is a worse fit."""
    random = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    base = nn.Linear(16, 12)
    pairs = {
        i: LowRank(torch.randn(2, 16, generator=random), torch.randn(12, 2, generator=random), 0.7) for i in (0, 1)
    }
    prototypes = torch.randn(2, 16, generator=random)
    places = 1 if scope == "sample" else 6
    kinds = torch.randint(0, 2, (32, places), generator=random).expand(32, 6)
    x = prototypes[kinds] + 0.3 * torch.randn(32, 6, 16, generator=random)
    gate = BlockGate(16, 2, GateConfig(scope=scope, scale=scale, hidden=32))
    weigher = Gated(gate, scope == "sample")
    layer = compose_layer(base.requires_grad_(False), ExpertBank(pairs, base.weight), weigher, "k")
    own = torch.stack([base(x) + x @ pair.delta().T for pair in pairs.values()], -1)
    target = own.gather(-1, kinds[..., None, None].expand(-1, -1, 12, 1)).squeeze(-1)
    start = float((layer(x) - target).square().mean().detach())
    optimiser = torch.optim.Adam(gate.parameters(), lr=0.03)
    for _ in range(250):
        loss = (layer(x) - target).square().mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    weights = weigher.gate(x, pool=scope == "sample").expand(-1, 6, -1)
    assert float(loss.detach()) < 1e-3 * start
    assert float(weights.detach().gather(-1, kinds.unsqueeze(-1)).min()) > 0.95


def test_unet_gate_learns_which_expert_was_asked_for(sd: Any) -> None:
    """Targets made by one expert alone: the gates of the composition move to it."""
    experts = [make_expert(sd, name, seed=seed, size=0.2) for seed, name in enumerate(("robot", "bunny"))]
    composition = compose(sd, experts)
    with composition:
        composition.condition(["a robot"], guidance=False)
        composition.mask("bunny")
        with torch.no_grad():
            target = run_unet(sd)
        composition.unmask()
        optimiser = torch.optim.Adam(composition.parameters(), lr=0.1)
        losses = []
        for _ in range(15):
            loss = (run_unet(sd) - target).square().mean()
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            losses.append(float(loss.detach()))
        assert losses[-1] < 0.1 * losses[0]
        means = [
            float(record.probabilities[..., 0].detach().mean()) for record in composition._context.records.values()
        ]
    assert sum(means) / len(means) > 0.8
