"""One table: what every gate must fulfil on every kind of model."""

from __future__ import annotations

import functools
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mole_diffusion import Composition, Expert, GateConfig, RouterConfig, StaticWeights, TriggerSpans, compose
from mole_diffusion.composition import learned_static, nla, weighted_sum
from mole_diffusion.functional import NULL_START
from mole_diffusion.gates import BlockGate
from mole_diffusion.persist import load_composition
from tests.core.small import (
    HOSTS,
    JOINT_TARGETS,
    add_experts,
    main_of,
    make_expert,
    models_of,
    randomise,
    run_model,
)

MODULE_TARGETS = ("conv", "head.0", "head.1")
TARGETS = (
    "to_q", "to_k", "to_v", "to_out.0", "ff.net.2", "conv1", "conv_in", "downsamplers.0.conv", "upsamplers.0.conv",
    "time_emb_proj", "linear_1", "proj_out", "q_proj", "SelfAttention.q", *JOINT_TARGETS, *MODULE_TARGETS,
)  # fmt: skip
PROMPTS = ["a robot", "a bunny"]
GATES: dict[str, Any] = {
    "block sample": GateConfig(),
    "block token null gain": GateConfig(scope="token", scale="null", gain=True),
    "block token sigmoid": GateConfig(scope="token", scale="sigmoid"),
    "block energy token": GateConfig(input="energy", scope="token"),
    "block energy sample": GateConfig(input="energy", gain=True),
    "block outputs sample sigmoid": GateConfig(input="expert_outputs", scale="sigmoid"),
    "block outputs token": GateConfig(input="expert_outputs", scope="token"),
    "block flattened null": GateConfig(input="flattened", latent=(8, 8), scale="null", gain=True),
    "layer token": GateConfig(granularity="layer", scope="token"),
    "layer energy sigmoid": GateConfig(granularity="layer", input="energy", scale="sigmoid"),
    "layer energy token null": GateConfig(granularity="layer", input="energy", scope="token", scale="null"),
    "layer outputs sample": GateConfig(granularity="layer", input="expert_outputs"),
    "layer flattened": GateConfig(granularity="layer", input="flattened", latent=(8, 8)),
    "matrix sample null": GateConfig(granularity="matrix", scale="null"),
    "matrix token": GateConfig(granularity="matrix", scope="token", gain=True),
    "matrix energy token sigmoid": GateConfig(granularity="matrix", input="energy", scope="token", scale="sigmoid"),
    "matrix energy sample": GateConfig(granularity="matrix", input="energy", gain=True),
    "network": GateConfig(granularity="network", gain=True),
    "network null": GateConfig(granularity="network", scale="null"),
    "nla": nla(2),
    "sum": weighted_sum(2),
    "named blocks": StaticWeights({"*": (0.5, 0.5)}, granularity="layer"),
    "learned static": learned_static(2),
    "learned static layer": replace(learned_static(2), granularity="layer"),
    "learned static network": replace(learned_static(2), granularity="network"),
    "spans": TriggerSpans(),
    "router token": RouterConfig(rank=3),
    "router sample": RouterConfig(rank=3, scope="sample", temperature=0.5),
}
OTHERS = (
    "block sample", "block token null gain", "block energy token", "block outputs sample sigmoid", "layer token",
    "block flattened null", "layer outputs sample", "matrix token", "network", "learned static", "spans",
    "router token",
)  # fmt: skip
ROWS = {
    "sd": tuple(GATES),
    "sdxl": ("block token null gain", "layer energy sigmoid", "block flattened null", "router token"),
    "pixart": OTHERS,
    "sd3": OTHERS,
    "module": tuple(gate for gate in OTHERS if gate not in ("spans", "block flattened null")),
}
TABLE = [(host, gate) for host, gates in ROWS.items() for gate in gates]
LOOKS = ("block sample", "block energy token", "block outputs token", "layer token", "matrix token", "network", "spans",
         "router token")  # fmt: skip

SCALES = (
    "block token null gain", "block token sigmoid", "layer energy sigmoid", "block flattened null", "network null",
    "nla", "sum", "learned static",
)  # fmt: skip


def learned(host: str, gate: str) -> bool:
    config = GATES[gate]
    return isinstance(config, GateConfig | RouterConfig) or getattr(config, "learnable", False)


table = pytest.mark.parametrize(("host", "gate"), TABLE)
table_looks = pytest.mark.parametrize(("host", "gate"), [row for row in TABLE if row[1] in LOOKS])
table_learned = pytest.mark.parametrize(("host", "gate"), [row for row in TABLE if learned(*row)])


@functools.cache
def pipe_of(host: str) -> Any:
    """One per model: compositions leave it as it was, which the first test of the table makes sure of."""
    return HOSTS[host]()


@functools.cache
@torch.no_grad()
def base_of(host: str) -> Tensor:
    """What it says before any composition came."""
    return run_model(pipe_of(host))


@functools.cache
def experts_of(host: str) -> tuple[Expert, ...]:
    """Mixed ranks and scales; the last leaves out the attention's outputs."""
    pipe, without = pipe_of(host), tuple(target for target in TARGETS if target != "to_out.0")
    return (
        make_expert(pipe, "robot", rank=2, seed=1, targets=TARGETS, size=0.1),
        make_expert(pipe, "bunny", rank=3, seed=2, targets=TARGETS, size=0.1, scale=1.3),
        make_expert(pipe, "cat", rank=1, seed=3, targets=without, size=0.1, scale=0.9),
    )


def composed(host: str, gate: Any, count: int = 2) -> Composition:
    return compose(pipe_of(host), experts_of(host)[:count], gate=gate)


def announce(composition: Composition, prompts: list[str] = PROMPTS, *, guidance: bool = False) -> None:
    composition.condition(None if composition.host.main == "module" else prompts, guidance=guidance)


@torch.no_grad()
def run(host: str, composition: Composition, rows: int = 2, **kwargs: Any) -> Tensor:
    announce(composition)
    return run_model(pipe_of(host), rows, **kwargs)


@functools.cache
def reference(host: str, weights: tuple[float, ...]) -> Tensor:
    """Static weights added to the model's own: none of our layers takes part."""
    with torch.no_grad():
        return run_model(add_experts(HOSTS[host](), dict(zip(experts_of(host), weights, strict=False))))


def close(found: Tensor, expected: Tensor, tolerance: float = 1e-5) -> None:
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


def state(pipe: Any) -> dict[str, Tensor]:
    return {f"{name}.{key}": t.clone() for name, m in models_of(pipe).items() for key, t in m.state_dict().items()}


@table
def test_masks_files_and_detaching(host: str, gate: str, tmp_path: Path) -> None:
    """All masked is the base bit for bit; saved is loaded; the model is what it was afterwards."""
    pipe, before = pipe_of(host), base_of(host)
    tensors, hooks = state(pipe), len(main_of(pipe)._forward_pre_hooks)
    composition = composed(host, GATES[gate])
    randomise(composition)
    with composition:
        changed = run(host, composition)
        assert changed.isfinite().all() and not torch.equal(changed, before)
        composition.mask("robot", "bunny")
        assert torch.equal(run(host, composition), before)
    after = state(pipe)
    assert list(after) == list(tensors) and all(torch.equal(after[key], tensors[key]) for key in tensors)
    assert len(main_of(pipe)._forward_pre_hooks) == hooks
    with torch.no_grad():
        assert torch.equal(run_model(pipe), before)
    path = composition.save(tmp_path / "c.safetensors")
    again = load_composition(path, pipe, {expert.sha256: expert for expert in experts_of(host)})
    assert again.config == composition.config
    with again:
        assert torch.equal(run(host, again), changed)


@table
def test_start_and_one_hot(host: str, gate: str) -> None:
    """At the start NLA; with a null expert 1 / (2 + e⁻³) each; a plain sum 1 each. One-hot is that expert alone."""
    config, pipe = GATES[gate], pipe_of(host)
    null = getattr(config, "scale", "") == "null"
    start = 1.0 if gate == "sum" else 1 / (2 + math.exp(NULL_START)) if null else 0.5
    composition, weight = composed(host, config), 1.0
    with composition, torch.no_grad():
        announce(composition, ["nobody", "nothing"])
        close(run_model(pipe), reference(host, (start, start)))
        if isinstance(config, StaticWeights):
            composition.gate.table[:] = torch.tensor([0.0, 1.0])
        elif isinstance(config, RouterConfig | TriggerSpans) or config.input == "flattened":
            composition.mask("robot")
            weight = 1 / (1 + math.exp(NULL_START)) if null else 1.0
        else:
            for part in composition.gate.modules():
                if isinstance(part, BlockGate):
                    part.up.bias[:2] = torch.tensor([-60.0, 60.0])
        close(run(host, composition), reference(host, (0.0, weight)))


@table_learned
def test_gradients_reach_every_gate_parameter_and_nothing_else(host: str, gate: str) -> None:
    pipe = pipe_of(host)
    composition = composed(host, GATES[gate])
    randomise(composition, size=0.2)
    with composition.train():
        announce(composition)
        (run_model(pipe).square().mean() + 0.5 * composition.balance_loss()).backward()
        banks = [tensor for layer in composition._attachment.layers.values() for tensor in layer.bank.buffers()]
        assert not any(tensor.requires_grad for tensor in banks)
    for name, parameter in composition.gate.named_parameters():
        if host == "module" and (".time." in name or "network.down" in name):  # it has neither timestep nor text
            continue
        if host == "sd3" and name.startswith("texts.transformer_blocks/1/attn/add_q_proj"):
            continue  # the last block throws away what its text asks
        assert parameter.grad is not None and parameter.grad.isfinite().all() and parameter.grad.abs().sum() > 0, name
    assert all(parameter.grad is None for model in models_of(pipe).values() for parameter in model.parameters())


@pytest.mark.parametrize(("host", "gate"), [("sd", gate) for gate in (*LOOKS, *SCALES)])
def test_masks_exclude_and_redistribute(host: str, gate: str) -> None:
    config = GATES[gate]
    if isinstance(config, StaticWeights):
        config = replace(config, weights=(0.5, 0.2, 0.3))
    composition = composed(host, config, count=3)
    randomise(composition)
    with composition:
        run(host, composition)
        name, full = next((name, record.probabilities) for name, record in composition._context.records.items())
        composition.mask("bunny")
        run(host, composition)
        part = composition._context.records[name].probabilities
    kept = [0, 2]
    assert not part[..., 1].any()
    if composition.gate.total != "share":  # plain sums and sigmoids: nobody inherits
        close(part[..., kept], full[..., kept])
        return
    whole, left = (weights.sum(-1, keepdim=True) for weights in (full, full[..., kept]))
    if isinstance(config, StaticWeights):
        close(part.sum(-1), full.sum(-1))
    elif not isinstance(config, TriggerSpans):
        spare = 1 - whole if getattr(config, "scale", "") == "null" else torch.zeros_like(whole)
        close(part[..., kept], full[..., kept] / (left + spare), 1e-4)


@pytest.mark.parametrize(
    ("host", "gate", "rows"),
    [(*row, rows) for row in TABLE for rows in ("reuse", "own")
     if row[1] in LOOKS and (rows == "reuse" or row[0] in ("sd", "sd3"))],
)  # fmt: skip
def test_guidance_rows(host: str, gate: str, rows: Any) -> None:
    """Reuse: unconditional rows take the weights of the conditional ones; own: as if there were no guidance."""
    config = GATES[gate]
    composition = composed(host, replace(config, guidance_rows=rows))
    randomise(composition)
    with composition, torch.no_grad():
        announce(composition, PROMPTS, guidance=True)
        both = run_model(pipe_of(host), 4)
        records = dict(composition._context.records)
        announce(composition, ["", "", *PROMPTS])
        apart = run_model(pipe_of(host), 4)
        for name, record in composition._context.records.items():
            if name in records:
                own = record.probabilities if rows == "own" else record.probabilities[-2:]
                close(records[name].probabilities, own, 1e-3)
    close(both[2:], apart[2:], 1e-4)
    if rows == "own":
        close(both[:2], apart[:2], 1e-4)


@table_looks
def test_sizes_and_batches_are_free(host: str, gate: str) -> None:
    """A row of a batch is what it is alone, at any size."""
    composition = composed(host, GATES[gate])
    randomise(composition)
    with composition, torch.no_grad():
        announce(composition, ["a robot"])
        batch = run_model(pipe_of(host), 3, size=(12, 10))
        close(batch[1:2], run_model(pipe_of(host), 3, size=(12, 10), only=1), 1e-4)


CHECKPOINTED = [
    ("sd", "block token null gain"), ("sd", "block energy token"), ("sd", "layer outputs sample"),
    ("sdxl", "router token"), ("pixart", "block energy token"), ("pixart", "block flattened null"),
    ("sd3", "matrix token"), ("sd3", "layer token"),
]  # fmt: skip


@pytest.mark.parametrize(("host", "gate"), CHECKPOINTED)
def test_gradient_checkpointing_gives_the_same_gradients(host: str, gate: str) -> None:
    pipe = pipe_of(host)
    model: Any = main_of(pipe)
    composition = composed(host, GATES[gate])
    randomise(composition, size=0.2)
    found = []
    with composition.train():
        for on in (False, True):
            if on:
                model.enable_gradient_checkpointing()
                model.train()
            announce(composition)
            (run_model(pipe).square().mean() + 0.1 * composition.balance_loss()).backward()
            found.append(
                [parameter.grad.clone() for parameter in composition.parameters() if parameter.grad is not None]
            )
            composition.gate.zero_grad()
    model.disable_gradient_checkpointing()
    model.eval()
    for plain, again in zip(*found, strict=True):
        torch.testing.assert_close(again, plain, rtol=1e-3, atol=1e-6)


PRECISE = [
    ("sd", gate) for gate in ("block token null gain", "block energy sample", "matrix token", "nla", "router token")
]
PRECISE += [("pixart", "block outputs sample sigmoid"), ("sd3", "block token null gain"), ("module", "router token")]


@pytest.mark.parametrize(("host", "gate"), PRECISE)
@torch.no_grad()
def test_autocast(host: str, gate: str) -> None:
    pipe = pipe_of(host)
    with torch.autocast("cpu", torch.bfloat16):
        before = run_model(pipe)
    composition = composed(host, GATES[gate])
    randomise(composition, size=0.1)
    with composition:
        exact = run(host, composition)
        with torch.autocast("cpu", torch.bfloat16):
            half = run(host, composition)
            assert all(record.probabilities.dtype == torch.float32 for record in composition._context.records.values())
            composition.mask("robot", "bunny")
            assert torch.equal(run(host, composition), before)
    assert (half.float() - exact).abs().mean() < 0.05 * exact.abs().mean()


@pytest.mark.parametrize(("host", "gate"), PRECISE)
@torch.no_grad()
def test_bf16(host: str, gate: str) -> None:
    """Gates stay in fp32, the model's output in bf16 and near the exact one; the base bit for bit where all are off."""
    config = GATES[gate]
    exact = composed(host, config)
    randomise(exact, size=0.1)
    with exact:
        expected = run(host, exact)
    pipe = HOSTS[host]()
    for model in models_of(pipe).values():
        model.to(torch.bfloat16)
    before, tensors = run_model(pipe), state(pipe)
    composition = compose(pipe, experts_of(host)[:2], gate=config)
    composition.load_state_dict(exact.state_dict())
    with composition:
        announce(composition)
        found = run_model(pipe)
        assert found.dtype == torch.bfloat16
        assert all(parameter.dtype == torch.float32 for parameter in composition.parameters())
        assert all(record.probabilities.dtype == torch.float32 for record in composition._context.records.values())
        composition.mask("robot", "bunny")
        assert torch.equal(run_model(pipe), before)
    after = state(pipe)
    assert all(torch.equal(after[key], tensors[key]) for key in tensors)
    assert (found.float() - expected).abs().mean() < 0.05 * expected.abs().mean()
