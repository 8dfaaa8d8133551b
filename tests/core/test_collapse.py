"""Compositions as one LoRA: exact for static weights, the calibration's mean for learned gates."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from mole_diffusion import Expert, GateConfig, StaticWeights, compose
from mole_diffusion.composition import nla
from mole_diffusion.errors import InvalidRequest
from mole_diffusion.experts import save_expert
from tests.core.small import SD_TARGETS, generate, make_expert, randomise, shapes_of


def two(pipe: Any) -> list[Expert]:
    targets = (*SD_TARGETS, "conv1", "q_proj")
    return [
        make_expert(pipe, name, rank=rank, seed=rank, targets=targets, size=0.1)
        for rank, name in ((2, "robot"), (3, "bunny"))
    ]


@pytest.mark.parametrize("file_format", ["kohya", "diffusers"])
def test_static_weights_equal_their_one_file(pipe: Any, tmp_path: Any, file_format: Any) -> None:
    with compose(pipe, two(pipe), gate=StaticWeights((0.3, 0.9))) as composition:
        assert composition.is_static
        expected, expert = generate(pipe), composition.collapse("both")
    path = save_expert(expert, tmp_path / "both.safetensors", format=file_format)
    loaded = Expert.load(path, shapes=shapes_of(pipe))
    assert set(loaded.ranks) == {5}
    with compose(pipe, [loaded], gate=nla(1)):
        torch.testing.assert_close(generate(pipe), expected, rtol=1e-5, atol=1e-5)


def test_learned_gates_are_averaged_per_block_and_for_text_apart(sd: Any) -> None:
    experts = two(sd)
    composition = compose(sd, experts, gate=GateConfig(scope="token", gain=True))
    randomise(composition)
    with composition:
        with pytest.raises(InvalidRequest, match="nothing was recorded"):
            composition.collapse()
        traces = []
        for prompt in ("a robot and a bunny", "a bunny"):
            generate(sd, prompt)
            traces.append(composition.trace())
        assert not composition.is_static
        expert = composition.collapse("both", traces=traces)
    for key in ("attn2.to_k", "attn1.to_q", "ff.net.2"):
        name = next(name for name in expert.modules if name.endswith(key))
        block = name.removeprefix("unet.").removesuffix(f".{key}")
        block = f"{block}:text" if key == "attn2.to_k" else block
        steps = torch.tensor([row for trace in traces for row in trace.weights[block]])
        assert steps.shape == (4, 2)
        mean = steps.mean(0)
        deltas = [other.modules[name].delta() for other in experts]
        torch.testing.assert_close(expert.modules[name].delta(), mean[0] * deltas[0] + mean[1] * deltas[1])
    tower = next(name for name in expert.modules if name.startswith("text_encoder"))
    halves = sum(other.modules[tower].delta() for other in experts) / 2
    torch.testing.assert_close(expert.modules[tower].delta(), halves)


def test_traces_of_other_experts_are_refused(sd: Any) -> None:
    experts = two(sd)
    with compose(sd, experts) as composition:
        generate(sd)
        foreign = composition.trace()
    with compose(sd, experts[::-1]) as composition, pytest.raises(InvalidRequest, match="other experts"):
        composition.collapse(traces=[foreign])


def test_places_and_rows_of_their_own_cannot_collapse(sd: Any) -> None:
    with compose(sd, two(sd), gate=GateConfig(scope="token")) as composition:
        generate(sd)
        composition.place({"robot": (0, 0, 0.5, 1)})
        with pytest.raises(InvalidRequest, match="call place"):
            composition.collapse()
        composition.place(None)
        assert composition.collapse().modules


def test_tokens_are_kept(sd: Any) -> None:
    from dataclasses import replace

    vectors = {"text_encoder": torch.ones(1, 24)}
    robot, bunny = two(sd)
    whole = compose(sd, [replace(robot, embeddings={"<s0>": vectors}), bunny], gate=nla(2)).collapse()
    assert torch.equal(whole.embeddings["<s0>"]["text_encoder"], vectors["text_encoder"])
