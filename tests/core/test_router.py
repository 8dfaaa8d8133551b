"""RouterLoRA: against the paper's equations written out, and what follows from them."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mole_diffusion import Composition, Expert, RouterConfig, compose
from mole_diffusion.composition import nla
from mole_diffusion.errors import BaseMismatch, InvalidFile
from mole_diffusion.experts.canonical import LowRank
from mole_diffusion.experts.safefile import read_header, read_tensors
from mole_diffusion.experts.save import write_safetensors
from mole_diffusion.gates.router import RouterGates, TrainedRouter
from mole_diffusion.gates.router_file import CONTENT_KEY, load_router, read_router_header, save_router
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


class Words(torch.nn.Module):
    """One linear layer over tokens of width 9: a name in the first 8 channels, and 1."""

    def __init__(self) -> None:
        super().__init__()
        self.head = torch.nn.Linear(9, 8, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x)


def named(count: int, seed: int) -> list[Expert]:
    """Experts that always write a direction of their own: a turned copy of their name, which stands in ``code``."""
    turn = torch.linalg.qr(torch.randn(8, 8, generator=torch.Generator().manual_seed(9)))[0]
    random = torch.Generator().manual_seed(seed)
    codes = torch.linalg.qr(torch.randn(8, 8, generator=random))[0][:count]
    one = torch.tensor([[0.0] * 8 + [1.0]])
    return [
        Expert(f"e{seed}-{i}", {"module.head": LowRank(one, (turn @ code)[:, None], 1.0)}, metadata={"code": str(i)})
        for i, code in enumerate(codes)
    ]


def names_of(experts: list[Expert]) -> Tensor:
    """(E, 9) tokens that name each expert."""
    turn = torch.linalg.qr(torch.randn(8, 8, generator=torch.Generator().manual_seed(9)))[0]
    return torch.stack([torch.cat([turn.T @ e.modules["module.head"].b[:, 0], torch.ones(1)]) for e in experts])


def choose(composition: Composition, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """What the module writes for tokens (E, 9), and the weight of each expert for each, (E, E)."""
    composition.condition(None, guidance=False)
    written = composition.pipe(tokens[None])[0]
    return written, composition._context.records["head"].probabilities[0]


def test_learns_to_pick_the_one_that_is_named_also_of_a_pair_it_never_saw() -> None:
    """Two experts write two directions; a token names one of them. What was learned holds for others."""
    torch.manual_seed(0)
    module = Words()
    plain = module.head.weight.detach().clone()
    router = RouterGates({"head": (9, 8)}, RouterConfig(rank=8))
    optimiser = torch.optim.Adam(router.parameters(), lr=3e-2)
    composition = compose(module, named(2, 0), gate=RouterConfig(rank=8)).attach()
    losses = []
    for step in range(300):
        pair = named(2, 1 + step)
        composition.switch(pair)
        composition.gate.borrow(router)  # type: ignore[union-attr]
        tokens = names_of(pair)
        wanted = tokens @ plain.T + torch.stack([e.modules["module.head"].b[:, 0] for e in pair])
        loss = F.mse_loss(choose(composition, tokens)[0], wanted)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[0] > 0.05 and sum(losses[-20:]) / 20 < 0.1 * losses[0]
    strangers = named(3, 10_000)
    composition.switch(strangers[:2])
    composition.gate.borrow(router)  # type: ignore[union-attr]
    with torch.no_grad():
        weights = choose(composition, names_of(strangers[:2]))[1]
        assert weights.diagonal().min() > 0.8
        composition.switch(strangers)
        composition.gate.borrow(router)  # type: ignore[union-attr]
        assert choose(composition, names_of(strangers))[1].diagonal().min() > 0.7
    composition.detach()


@torch.no_grad()
def test_a_row_gives_nothing_to_experts_that_are_absent_from_it() -> None:
    module = make_module()
    composition = compose(module, experts(module), gate=RouterConfig(rank=4))
    randomise(composition)
    x = torch.randn(2, 4, 6, 5, generator=torch.Generator().manual_seed(0))
    with composition:
        composition.condition(["a", "b"], guidance=False, subsets=[["robot"], ["robot", "cat"]])
        both = module(x)
        weights = composition._context.records["head.0"].probabilities
        assert torch.equal(weights[0, :, 1:], torch.zeros(30, 2)) and torch.equal(weights[0, :, 0], torch.ones(30))
        assert torch.equal(weights[1, :, 1], torch.zeros(30)) and bool((weights[1, :, [0, 2]] > 0).all())
        composition.condition(None, guidance=False)
        composition.mask("bunny")
        torch.testing.assert_close(module(x)[1], both[1])


def trained(folder: Path) -> tuple[Any, list[Expert], Path]:
    """A randomised router of a tiny pipeline in a file, and what it was composed with."""
    pipe = make_sd()
    found = experts(pipe, SD_TARGETS)
    composition = compose(pipe, found[:2], gate=RouterConfig(rank=3, temperature=0.5))
    randomise(composition)
    gate: Any = composition.gate
    return pipe, found, save_router(gate, folder / "router.safetensors", recipe={"steps": 3})


def test_a_routers_file_takes_any_experts(tmp_path: Path) -> None:
    pipe, found, path = trained(tmp_path)
    router = load_router(path)
    assert isinstance(router, TrainedRouter) and (router.rank, router.temperature) == (3, 0.5)
    assert read_router_header(path).recipe == {"steps": 3}
    composition = compose(pipe, found[1:], gate=router)
    state = composition.state_dict()
    assert state.keys() == router.tensors.keys() and all(torch.equal(state[k], v) for k, v in router.tensors.items())
    with composition:
        expected = generate(pipe)
        composition.switch(found)
        again = composition.state_dict()
        assert all(torch.equal(again[key], value) for key, value in router.tensors.items())
    saved = compose(pipe, found[1:], gate=router).save(tmp_path / "composition.safetensors")
    with load_composition(saved, pipe, {expert.sha256: expert for expert in found[1:]}):
        assert torch.equal(generate(pipe), expected)


def test_modules_that_a_router_never_saw_start_at_nla(tmp_path: Path) -> None:
    pipe, _, path = trained(tmp_path)
    other = make_expert(pipe, "other", targets=(*SD_TARGETS, "conv1"))
    state = compose(pipe, [other], gate=load_router(path)).state_dict()
    assert any("conv1" in key for key in state)
    assert all(not value.any() for key, value in state.items() if "conv1" in key and key.endswith(".b"))


class _Family:
    def __init__(self, family: str, prediction_type: str) -> None:
        self.family, self.prediction_type, self.title = family, prediction_type, family.upper()


def test_a_router_of_another_base_is_refused(tmp_path: Path) -> None:
    module = make_module()
    gate: Any = compose(module, experts(module), gate=RouterConfig(rank=3)).gate
    path = save_router(gate, tmp_path / "router.safetensors", _Family("sd21", "v_prediction"))
    assert load_router(path, _Family("sd21", "v_prediction")).rank == 3
    with pytest.raises(BaseMismatch, match="trained on sd21, not on SDXL"):
        load_router(path, _Family("sdxl", "epsilon"))
    with pytest.raises(BaseMismatch, match="predicts v_prediction, SD21 predicts epsilon"):
        load_router(path, _Family("sd21", "epsilon"))
    pipe = make_sd()
    with pytest.raises(BaseMismatch, match="knows none of the modules"):
        compose(pipe, experts(pipe, SD_TARGETS), gate=load_router(path))
    wide = {name: torch.cat([value, value], -1) if name.endswith(".a") else value for name, value in
            load_router(path).tensors.items()}  # fmt: skip
    with pytest.raises(BaseMismatch, match="learned on another base: at"):
        compose(module, experts(module), gate=TrainedRouter(RouterConfig(rank=3), wide))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"gate": {"kind": "trigger_spans"}}, "another kind of gate"),
        ({"gate": {"kind": "router", "rank": 0}}, "malformed"),
        ({"gate": {"kind": "router", "rank": 5}}, "do not make a router of rank 5"),
        ({"base": 3}, "must hold base"),
        ({"extra": 1}, "must hold base"),
    ],
)
def test_a_damaged_router_is_refused(tmp_path: Path, change: dict[str, Any], words: str) -> None:
    _, _, path = trained(tmp_path)
    metadata = dict(read_header(path).metadata)
    metadata[CONTENT_KEY] = json.dumps({**json.loads(metadata[CONTENT_KEY]), **change})
    write_safetensors(read_tensors(path), path, metadata)
    with pytest.raises(InvalidFile, match=words):
        load_router(path)
    with pytest.raises(InvalidFile, match="not a trained router"):
        load_router(write_safetensors(read_tensors(path), tmp_path / "plain.safetensors", {}))
