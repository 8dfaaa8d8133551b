"""Other experts on an attached composition, and compiled models that stay compiled."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch._dynamo.testing import CompileCounter

from mole_diffusion import Expert, GateConfig, RouterConfig, compose
from mole_diffusion.composition import learned_static, nla
from mole_diffusion.errors import BaseMismatch, InvalidRequest
from tests.core.small import SD_TARGETS, generate, make_expert, make_sdxl, randomise, run_unet


def expert(pipe: Any, name: str, rank: int = 2, targets: tuple[str, ...] = SD_TARGETS) -> Expert:
    return make_expert(pipe, name, rank=rank, seed=len(name) + rank, targets=targets, size=0.1)


@pytest.mark.parametrize("bucket", [False, True])
@pytest.mark.parametrize("gate", [GateConfig(scope="token"), nla(2), learned_static(2), GateConfig(input="energy")])
def test_switching_equals_composing_anew(sd: Any, gate: Any, bucket: bool) -> None:
    first, second = [expert(sd, "robot"), expert(sd, "bunny", 3)], [expert(sd, "cat", 3), expert(sd, "wombat")]
    before = generate(sd)
    with compose(sd, second, gate=gate) as composition:
        expected = generate(sd, "a cat and a wombat")
    composition = compose(sd, first, gate=gate, bucket=bucket)
    with composition:
        layers = dict(composition._attachment.layers)  # type: ignore[union-attr]
        randomise(composition)
        composition.mask("robot")
        generate(sd)
        composition.switch(second)
        assert composition.names == ("cat", "wombat") and composition.masked == () and composition.attached
        torch.testing.assert_close(generate(sd, "a cat and a wombat"), expected, rtol=1e-5, atol=1e-5)
        kept = all(layers[key] is layer for key, layer in composition._attachment.layers.items())  # type: ignore[union-attr]
        assert kept == bucket
    assert torch.equal(generate(sd), before)


@pytest.mark.parametrize("gate", [GateConfig(), RouterConfig(), GateConfig(input="energy")])
def test_padding_changes_no_output(pipe: Any, gate: Any) -> None:
    """Mixed ranks, an expert that touches few modules, convolutions: zero rows add nothing, and nobody is weighed
    where he is absent."""
    experts = [expert(pipe, "robot", 3, (*SD_TARGETS, "conv1", "q_proj")), expert(pipe, "bunny", 5, ("to_v",))]
    pictures = []
    for bucket in (False, True):
        torch.manual_seed(0)
        with compose(pipe, experts, bucket=bucket, gate=gate) as composition:
            randomise(composition)
            pictures.append(generate(pipe))
    torch.testing.assert_close(pictures[0], pictures[1], rtol=1e-5, atol=1e-5)


def test_an_expert_of_another_base_leaves_everything(sd: Any) -> None:
    stranger, twin = expert(make_sdxl(), "stranger"), expert(sd, "robot", 4)
    with compose(sd, [expert(sd, "robot"), expert(sd, "bunny", 3)]) as composition:
        randomise(composition)
        before = generate(sd)
        with pytest.raises(BaseMismatch):
            composition.add(stranger)
        with pytest.raises(InvalidRequest, match="named 'robot'"):
            composition.add(twin)
        with pytest.raises(InvalidRequest, match="No expert"):
            composition.remove("nobody")
        assert torch.equal(generate(sd), before)


def test_a_router_keeps_its_modules_when_an_expert_brings_others(sd: Any) -> None:
    wombat = expert(sd, "wombat", targets=(*SD_TARGETS, "conv1"))
    composition = compose(sd, [expert(sd, "robot"), expert(sd, "bunny", 3)], gate=RouterConfig(rank=2))
    randomise(composition)
    before = {key: value.clone() for key, value in composition.state_dict().items()}
    composition.add(wombat)
    after = composition.state_dict()
    assert len(after) > len(before) and all(torch.equal(after[key], value) for key, value in before.items())
    with pytest.raises(InvalidRequest, match="keep its rank"):
        composition.switch([wombat], gate=RouterConfig(rank=3))


def test_masks_do_not_move_the_place_at_which_energy_gates_look(sd: Any) -> None:
    """The first module of a block has the masked expert alone: the gates of the others stay renormalised."""
    experts = [expert(sd, "robot", targets=("attn1.to_q",)), expert(sd, "bunny", 3), expert(sd, "cat")]
    experts[1:] = [expert(sd, name, targets=("to_out.0", "ff.net.2")) for name in ("bunny", "cat")]
    composition = compose(sd, experts, gate=GateConfig(input="energy"))
    randomise(composition)
    with composition, torch.no_grad():
        composition.condition(["a"], guidance=False)
        run_unet(sd)
        name = next(iter(composition._context.records))
        whole = composition._context.records[name].probabilities
        composition.mask("robot")
        run_unet(sd)
        rest = composition._context.records[name].probabilities
    torch.testing.assert_close(rest[..., 1:], whole[..., 1:] / whole[..., 1:].sum(-1, keepdim=True))


def test_a_router_keeps_what_it_learned_when_experts_come_and_go(sd: Any) -> None:
    wombat = expert(sd, "wombat")
    composition = compose(sd, [expert(sd, "robot"), expert(sd, "bunny", 3)], gate=RouterConfig(rank=2))
    with composition, torch.no_grad():
        randomise(composition)
        state = {key: value.clone() for key, value in composition.state_dict().items()}
        composition.condition(["a"], guidance=False)
        two = run_unet(sd)
        composition.add(wombat)
        assert composition.names == ("robot", "bunny", "wombat")
        composition.condition(["a"], guidance=False)
        assert not torch.allclose(run_unet(sd), two)
        composition.remove("wombat")
        composition.condition(["a"], guidance=False)
        torch.testing.assert_close(run_unet(sd), two)
        assert all(torch.equal(state[key], value) for key, value in composition.state_dict().items())


@pytest.mark.parametrize("config", [GateConfig(), GateConfig(scope="token", scale="null", gain=True)])
def test_compiled_whole_and_once(sd: Any, config: GateConfig) -> None:
    """No graph breaks; masks, gates, prompts and experts of the same bucket compile nothing again."""
    torch._dynamo.reset()
    others = [expert(sd, "cat", 4), expert(sd, "wombat")]
    composition = compose(sd, [expert(sd, "robot"), expert(sd, "bunny", 3)], gate=config, bucket=True)
    counter = CompileCounter()
    with composition, torch.no_grad():
        unet = sd.unet
        compiled = torch.compile(unet, backend=counter, fullgraph=True)

        def both() -> None:
            composition.condition(["a robot"], guidance=True)
            plain = run_unet(sd)
            composition.condition(["a robot"], guidance=True)
            random = torch.Generator().manual_seed(1)
            sample = torch.randn(2, 4, 8, 8, generator=random)
            text = torch.randn(2, sd.tokenizer.model_max_length, unet.config.cross_attention_dim, generator=random)
            fast = compiled(sample, torch.tensor(500), encoder_hidden_states=text).sample
            torch.testing.assert_close(fast, plain, rtol=1e-4, atol=1e-4)

        for _ in range(3):
            both()
        graphs = counter.frame_count
        composition.mask("bunny")
        both()
        composition.unmask()
        randomise(composition)
        both()
        composition.switch(others)
        both()
        assert counter.frame_count == graphs
    torch._dynamo.reset()
