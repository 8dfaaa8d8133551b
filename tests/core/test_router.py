"""RouterLoRA: against the paper's equations written out, and what follows from them."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mole_diffusion import Composition, Expert, RouterConfig, compose
from mole_diffusion.composition import nla
from mole_diffusion.persist import load_composition
from tests.core.small import SD_TARGETS, generate, make_expert, make_module, make_sd, randomise, run_model

MODULES = ("conv", "head.0", "head.1")


def experts(pipe: Any, targets: tuple[str, ...] = MODULES) -> list[Expert]:
    """Mixed ranks and scales; the last leaves one module out."""
    return [
        make_expert(pipe, "robot", rank=2, seed=1, targets=targets, size=0.3),
        make_expert(pipe, "bunny", rank=3, seed=2, targets=targets, size=0.3, scale=1.3),
        make_expert(pipe, "cat", rank=1, seed=3, targets=targets[:-1], size=0.4, scale=0.9),
    ]


@torch.no_grad()
def run(composition: Composition, **kwargs: Any) -> Tensor:
    composition.condition(None, guidance=False)
    return run_model(composition.pipe, **kwargs)


def literal(composition: Composition, x: Tensor) -> Tensor:
    """arXiv 2406.16989 with v_i built: x' = W·x + Σ softmax_i(⟨A_r·x, B_rᵀ·v_i⟩ / √r / τ)·v_i, module after module."""
    config, module = composition.config, composition.pipe
    assert isinstance(config, RouterConfig)
    for path in MODULES:
        layer = module.get_submodule(path)
        router: Any = composition.gate.routers[path.replace(".", "/")]  # type: ignore[index]
        pairs = [e.modules[f"module.{path}"] for e in composition.experts if f"module.{path}" in e.modules]
        if path == "conv":
            places = x.flatten(2).mT
            values = torch.stack([F.conv2d(x, pair.delta(), padding=1).flatten(2).mT for pair in pairs], -1)
            plain = layer(x).flatten(2).mT
        else:
            places = x
            values = torch.stack([x @ pair.delta().T for pair in pairs], -1)
            plain = layer(x)
        keys = torch.einsum("dr,bldn->blrn", router.b, values)
        scores = torch.einsum("blr,blrn->bln", places @ router.a.T, keys) / math.sqrt(config.rank)
        if config.scope == "sample":
            scores = scores.mean(1, keepdim=True)
        weights = (scores / router.log_tau.exp()).softmax(-1)
        x = plain + torch.einsum("bln,bldn->bld", weights.expand(*values.shape[:2], -1), values)
        if path == "head.0":
            x = F.silu(x)
    return x


@pytest.mark.parametrize("scope", ["token", "sample"])
@torch.no_grad()
def test_the_papers_equations(scope: Any) -> None:
    module = make_module()
    x = torch.randn(2, 4, 6, 5, generator=torch.Generator().manual_seed(0))
    composition = compose(module, experts(module), gate=RouterConfig(rank=4, scope=scope, temperature=0.7))
    randomise(composition, size=0.7)
    expected = literal(composition, x)
    with composition:
        torch.testing.assert_close(module(x), expected, rtol=1e-4, atol=1e-5)
        spread = composition._context.records["conv"].probabilities
        assert spread.shape == (2, 30 if scope == "token" else 1, 3) and float(spread.std()) > 0.05


@pytest.mark.parametrize("scope", ["token", "sample"])
def test_starts_at_nla_and_the_order_of_experts_does_not_matter(scope: Any) -> None:
    pipe = make_sd()
    found = experts(pipe, SD_TARGETS)[:2]
    with compose(pipe, found, gate=nla(2)):
        expected = generate(pipe)
    first = compose(pipe, found, gate=RouterConfig(scope=scope))
    with first:
        torch.testing.assert_close(generate(pipe), expected, rtol=1e-5, atol=1e-5)
    randomise(first)
    with first:
        one = generate(pipe)
    second = compose(pipe, found[::-1], gate=RouterConfig(scope=scope))
    second.load_state_dict(first.state_dict())
    with second:
        torch.testing.assert_close(generate(pipe), one, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(one, expected, atol=1e-2)


def test_a_trained_router_takes_other_experts() -> None:
    """Its tensors fit any number of experts; one that is masked, or equals another, is told apart from neither."""
    module = make_module()
    three = experts(module)
    trained = compose(module, three[:2], gate=RouterConfig(rank=4))
    randomise(trained)
    with trained:
        two = run(trained)
    wider = compose(module, three, gate=RouterConfig(rank=4))
    assert trained.state_dict().keys() == wider.state_dict().keys()
    wider.load_state_dict(trained.state_dict())
    with wider:
        assert not torch.allclose(run(wider), two, atol=1e-3)
        wider.mask("cat")
        torch.testing.assert_close(run(wider), two, rtol=1e-5, atol=1e-5)
    twin = Expert("twin", three[0].modules)
    both = compose(module, [three[0], twin], gate=RouterConfig(rank=4))
    both.load_state_dict(trained.state_dict())
    with both:
        same = run(both)
    with compose(module, [three[0]], gate=nla(1)) as alone:
        torch.testing.assert_close(same, run(alone), rtol=1e-5, atol=1e-5)


def test_saved_and_loaded(tmp_path: Path) -> None:
    pipe = make_sd()
    found = experts(pipe, (*SD_TARGETS, "conv1", "downsamplers.0.conv"))[:2]
    composition = compose(pipe, found, gate=RouterConfig(rank=3, temperature=0.5))
    randomise(composition)
    with composition:
        expected = generate(pipe)
    path = composition.save(tmp_path / "router.safetensors")
    with load_composition(path, pipe, {expert.sha256: expert for expert in found}) as again:
        assert torch.equal(generate(pipe), expected)
        assert again.config == composition.config
