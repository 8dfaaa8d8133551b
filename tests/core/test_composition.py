"""Exact values of attached compositions: scopes × scales × both tiny pipelines."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from mole_diffusion import Expert, GateConfig, StaticWeights, TriggerSpans, compose
from mole_diffusion.composition import learned_static, nla, weighted_sum
from mole_diffusion.errors import BaseMismatch, InvalidRequest
from mole_diffusion.experts import save_expert
from mole_diffusion.layers.bank import ExpertBank
from tests.core.small import (
    CONV_TARGETS,
    OUTSIDE_TARGETS,
    SD_TARGETS,
    TEXT_TARGETS,
    generate,
    make_expert,
    make_sdxl,
    randomise,
    run_unet,
)

EVERYTHING = SD_TARGETS + CONV_TARGETS + OUTSIDE_TARGETS + TEXT_TARGETS
GATES: dict[str, Any] = {
    "sample": GateConfig(),
    "sample null": GateConfig(scale="null"),
    "sample sigmoid gain": GateConfig(scale="sigmoid", gain=True),
    "token": GateConfig(scope="token"),
    "token null gain": GateConfig(scope="token", scale="null", gain=True),
    "token sigmoid": GateConfig(scope="token", scale="sigmoid"),
    "own rows": GateConfig(scope="token", guidance_rows="own", text_prior=2.0, text_encoder="span"),
    "static": nla(2),
    "sum": weighted_sum(2),
    "learned static": learned_static(2),
    "spans": TriggerSpans(),
}


def two_experts(pipe: Any, targets: tuple[str, ...] = EVERYTHING) -> list[Expert]:
    return [
        make_expert(pipe, "robot", rank=2, seed=1, targets=targets, size=0.1),
        make_expert(pipe, "bunny", rank=3, seed=2, targets=targets, size=0.1, scale=1.3),
    ]


def networks(pipe: Any) -> dict[str, torch.nn.Module]:
    return {name: part for name, part in pipe.components.items() if isinstance(part, torch.nn.Module)}


def parameters(pipe: Any) -> list[torch.Tensor]:
    return [parameter for part in networks(pipe).values() for parameter in part.parameters()]


def whole_state(pipe: Any) -> dict[str, torch.Tensor]:
    """Copies of all tensors, the text encoders' too."""
    return {f"{n}.{k}": v.clone() for n, part in networks(pipe).items() for k, v in part.state_dict().items()}


@torch.no_grad()
def seen(pipe: Any, rows: int = 2) -> torch.Tensor:
    return run_unet(pipe, rows)


@pytest.mark.parametrize("gate", GATES)
def test_all_masked_is_the_base_and_detach_restores(pipe: Any, gate: str) -> None:
    before, image = seen(pipe), generate(pipe)
    state = whole_state(pipe)
    grads = [parameter.requires_grad for parameter in pipe.unet.parameters()]
    composition = compose(pipe, two_experts(pipe), gate=GATES[gate])
    with composition:
        if not isinstance(GATES[gate], StaticWeights):
            randomise(composition)
        changed = generate(pipe)
        assert changed.isfinite().all() and not torch.equal(changed, image)
        assert not any(parameter.requires_grad for parameter in pipe.unet.parameters())
        composition.mask("robot", "bunny")
        assert torch.equal(generate(pipe), image)
        composition.condition(["a robot"], guidance=False)
        assert torch.equal(seen(pipe), before)
        composition.unmask()
        assert torch.equal(generate(pipe), changed)
    after = whole_state(pipe)
    assert list(after) == list(state) and all(torch.equal(after[key], state[key]) for key in state)
    assert [parameter.requires_grad for parameter in pipe.unet.parameters()] == grads
    assert "encode_prompt" not in pipe.__dict__
    assert torch.equal(seen(pipe), before) and torch.equal(generate(pipe), image)


@pytest.mark.parametrize("targets", [SD_TARGETS, EVERYTHING])
@pytest.mark.parametrize("file_format", ["diffusers", "kohya"])
def test_one_expert_is_what_diffusers_makes_of_its_file(
    pipe: Any, targets: tuple[str, ...], file_format: Any, tmp_path: Path
) -> None:
    expert = make_expert(pipe, "robot", rank=2, targets=targets, size=0.1, scale=1.0 if file_format == "kohya" else 0.7)
    path = save_expert(expert, tmp_path / "robot.safetensors", format=file_format)
    loaded = Expert.load(path)
    assert set(loaded.modules) == set(expert.modules)
    with compose(pipe, [loaded], gate=GateConfig()):
        ours = generate(pipe)
    if hasattr(pipe, "text_encoder_2"):  # diffusers reads kohya files of SDXL in original names only
        path = save_expert(expert, path)
    pipe.load_lora_weights(str(tmp_path), weight_name=path.name)
    theirs = generate(pipe)
    with pytest.raises(InvalidRequest, match="unload_lora_weights"):
        compose(pipe, [loaded])
    pipe.unload_lora_weights()
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_one_hot_static_is_that_expert_alone(pipe: Any) -> None:
    experts = two_experts(pipe)
    with compose(pipe, experts[1:], gate=nla(1)):
        alone = generate(pipe)
    with compose(pipe, experts, gate=StaticWeights((0.0, 1.0))):
        torch.testing.assert_close(generate(pipe), alone, rtol=1e-5, atol=1e-5)
    for gate in (GateConfig(), GateConfig(scope="token"), nla(2)):
        composition = compose(pipe, experts, gate=gate)
        with composition:
            composition.mask("robot")
            assert composition.masked == ("robot",)
            torch.testing.assert_close(generate(pipe), alone, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("gate", ["sample", "token", "learned static"])
def test_training_starts_at_nla(pipe: Any, gate: str) -> None:
    experts = two_experts(pipe)
    with compose(pipe, experts, gate=nla(2)):
        expected = generate(pipe)
    with compose(pipe, experts, gate=GATES[gate]):
        torch.testing.assert_close(generate(pipe), expected, rtol=1e-5, atol=1e-5)


def test_merged_is_unmerged_and_unmerge_is_exact(pipe: Any) -> None:
    before, values = whole_state(pipe), [parameter.clone() for parameter in parameters(pipe)]
    experts = two_experts(pipe)
    composition = compose(pipe, experts, gate=StaticWeights((0.3, 0.9)))
    with composition:
        apart = generate(pipe)
        composition.merge()
        torch.testing.assert_close(generate(pipe), apart, rtol=1e-5, atol=1e-5)
        composition.mask("robot")
        masked = generate(pipe)
        composition.unmerge()
        torch.testing.assert_close(generate(pipe), masked, rtol=1e-5, atol=1e-5)
        assert all(torch.equal(a, b) for a, b in zip(values, parameters(pipe), strict=True))
        composition.merge()
    after = whole_state(pipe)
    assert list(after) == list(before) and all(torch.equal(after[key], before[key]) for key in before)
    collapsed = compose(pipe, experts, gate=StaticWeights((0.3, 0.9))).collapse()
    assert collapsed.ranks == {5: len(collapsed.modules)}
    with compose(pipe, [collapsed], gate=nla(1)):
        torch.testing.assert_close(generate(pipe), apart, rtol=1e-5, atol=1e-5)


def test_a_merge_that_fails_midway_leaves_the_base_alone(sd: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    before = [parameter.clone() for parameter in sd.unet.parameters()]
    whole, calls = ExpertBank.delta, []

    def fail_late(bank: ExpertBank, weights: torch.Tensor, base: torch.Tensor) -> torch.Tensor:
        calls.append(bank)
        if len(calls) == 5:
            raise MemoryError
        return whole(bank, weights, base)

    monkeypatch.setattr(ExpertBank, "delta", fail_late)
    with compose(sd, two_experts(sd), gate=StaticWeights((0.3, 0.9))) as composition, pytest.raises(MemoryError):
        composition.merge()
    assert all(torch.equal(a, b) for a, b in zip(before, sd.unet.parameters(), strict=True))


def test_learned_gates_cannot_be_merged(sd: Any) -> None:
    composition = compose(sd, two_experts(sd))
    with pytest.raises(InvalidRequest, match="Attach"):
        composition.merge()
    with composition, pytest.raises(InvalidRequest, match="Only static"):
        composition.merge()


def test_static_weights_per_block(sd: Any) -> None:
    experts = two_experts(sd)
    blocks = compose(sd, experts).blocks
    first = next(block for block in blocks if "transformer_blocks" in block)
    composition = compose(sd, experts, gate=StaticWeights({first: (1.0, 0.0), "*": (0.0, 0.0)}))
    only = {key: pair for key, pair in experts[0].modules.items() if key.startswith(f"unet.{first}.")}
    with composition:
        got = seen(sd)
    with compose(sd, [Expert("part", only)], gate=nla(1)):
        torch.testing.assert_close(got, seen(sd), rtol=1e-5, atol=1e-5)
    with pytest.raises(InvalidRequest, match="no numbers for the block"):
        compose(sd, experts, gate=StaticWeights({first: (1.0, 0.0)}))
    with pytest.raises(InvalidRequest, match="no expert touches"):
        compose(sd, experts, gate=StaticWeights({"nowhere": (1.0, 0.0), "*": (0.0, 0.0)}))
    with pytest.raises(InvalidRequest, match="one static weight for each of 2"):
        compose(sd, experts, gate=nla(3))


@pytest.mark.parametrize("scope", ["sample", "token"])
def test_permuted_experts_and_gates_give_the_same_picture(sd: Any, scope: Any) -> None:
    experts = two_experts(sd)
    first = compose(sd, experts, gate=GateConfig(scope=scope))
    randomise(first)
    second = compose(sd, experts[::-1], gate=GateConfig(scope=scope))
    flipped = {
        key: value.flip(0) if key.endswith(("up.weight", "up.bias")) else value
        for key, value in first.state_dict().items()
    }
    second.load_state_dict(flipped)
    with first:
        one = generate(sd)
    with second:
        torch.testing.assert_close(generate(sd), one, rtol=1e-5, atol=1e-5)


def test_experts_on_different_modules(sd: Any) -> None:
    """Each touches modules that the other does not."""
    robot = make_expert(sd, "robot", targets=("to_q",), size=0.1)
    bunny = make_expert(sd, "bunny", targets=("to_v", "conv1"), seed=1, size=0.1)
    both = Expert("both", {**robot.modules, **bunny.modules})
    with compose(sd, [robot, bunny], gate=weighted_sum(2)):
        apart = seen(sd)
    with compose(sd, [both], gate=nla(1)):
        torch.testing.assert_close(seen(sd), apart, rtol=1e-5, atol=1e-5)


def test_one_by_one_convolutions_fit_linear_layers(sd: Any) -> None:
    """SD 1-style files write 1×1 convolutions where SD 2.1 has linear layers."""
    from mole_diffusion.experts import LowRank

    flat = make_expert(sd, "robot", targets=("proj_in", "proj_out"))
    modules = {key: LowRank(pair.a[..., None, None], pair.b, pair.scale) for key, pair in flat.modules.items()}
    with compose(sd, [flat], gate=nla(1)):
        expected = seen(sd)
    with compose(sd, [Expert("conv", modules)], gate=nla(1)):
        assert torch.equal(seen(sd), expected)


def test_accelerators_are_always_on(sd: Any) -> None:
    robot, bunny = two_experts(sd)
    fast = Expert("fast", make_expert(sd, "fast", seed=5, size=0.1).modules, role="accelerator")
    composition = compose(sd, [fast, robot, bunny])
    randomise(composition)
    with compose(sd, [fast, robot], gate=weighted_sum([1.0])):
        expected = generate(sd)
    with composition:
        composition.mask("bunny")
        torch.testing.assert_close(generate(sd), expected, rtol=1e-5, atol=1e-5)
        assert composition.trace().names == ("robot", "bunny")
        composition.mask("robot", "fast")
        masked = generate(sd)
    assert torch.equal(masked, generate(sd))
    with pytest.raises(InvalidRequest, match="not an accelerator"):
        compose(sd, [fast])


def test_wrong_base_and_wrong_sets(sd: Any) -> None:
    robot = make_expert(make_sdxl(), "robot")
    with pytest.raises(BaseMismatch, match="does not fit this pipeline"):
        compose(sd, [robot])
    good = make_expert(sd, "robot")
    with pytest.raises(InvalidRequest, match="named 'robot'"):
        compose(sd, [good, make_expert(sd, "robot", seed=1)])
    with pytest.raises(InvalidRequest, match="at least one expert"):
        compose(sd, [])
    composition = compose(sd, [good])
    with pytest.raises(InvalidRequest, match="No expert is named 'cat'"):
        composition.mask("cat")
    with pytest.raises(InvalidRequest, match="call the UNet"):
        composition.balance_loss()
    with composition:
        with pytest.raises(InvalidRequest, match="already attached"):
            composition.attach()
        with pytest.raises(InvalidRequest, match="Another composition"):
            compose(sd, [good])
    composition.detach()


def test_an_error_while_attached_still_detaches(sd: Any) -> None:
    before = seen(sd)
    with pytest.raises(RuntimeError, match="mine"), compose(sd, two_experts(sd)):
        raise RuntimeError("mine")
    assert torch.equal(seen(sd), before)


def test_half_attached_is_rolled_back(sd: Any) -> None:
    """Something that cannot be swapped in the middle of attaching leaves the pipeline as it was."""
    names = [name for name, _ in sd.unet.named_modules()]
    composition = compose(sd, two_experts(sd))
    del sd.unet.mid_block.resnets[0].conv2
    with pytest.raises((AttributeError, BaseMismatch)):
        composition.attach()
    assert [name for name, _ in sd.unet.named_modules()] == [
        name for name in names if "mid_block.resnets.0.conv2" not in name
    ]


def test_sizes_and_batches_are_free(sd: Any) -> None:
    composition = compose(sd, two_experts(sd), gate=GateConfig(scope="token"))
    randomise(composition)
    with composition, torch.no_grad():
        for rows, size in ((1, (8, 8)), (3, (8, 16)), (2, (12, 10)), (1, (16, 16))):
            composition.condition(["a robot"], guidance=False)
            assert run_unet(sd, rows, size=size).shape == (rows, 4, *size)
            assert composition.trace().weights


def test_half_precision_pipeline(sd: Any) -> None:
    composition = compose(sd, two_experts(sd), gate=GateConfig(scope="token"))
    randomise(composition)
    with composition:
        exact = generate(sd)
    sd.to(torch.bfloat16)
    with composition:
        got = generate(sd)
        assert got.dtype == torch.bfloat16
        assert all(parameter.dtype == torch.float32 for parameter in composition.parameters())
    assert (got.float() - exact).abs().mean() < 0.2 * exact.abs().mean()
