"""What gates see and say: prompts, guidance, places, masks, traces, settings."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch

from mole_diffusion import GateConfig, RouterConfig, StaticWeights, TriggerSpans, compose
from mole_diffusion.errors import InvalidRequest
from mole_diffusion.gates import BlockGate
from mole_diffusion.gates.config import gate_from_json, gate_to_json, learned_static, nla, weighted_sum
from mole_diffusion.gates.span import span_weights
from mole_diffusion.prompts import prompt_spans
from mole_diffusion.trace import MAX_MAPS, MAX_SIDE, Recorder
from tests.core.small import SD_TARGETS, generate, make_expert, make_sd, randomise, run_unet


def two_experts(pipe: Any, targets: tuple[str, ...] = SD_TARGETS) -> list[Any]:
    return [
        make_expert(pipe, "robot", seed=1, targets=targets, size=0.1),
        make_expert(pipe, "bunny", seed=2, targets=targets, size=0.1, rank=3),
    ]


def test_spans_of_a_prompt_ignore_case_and_cover_every_occurrence(sd: Any) -> None:
    experts = two_experts(sd)
    spans = prompt_spans(sd, ["a Robot, robot", "a bun"], experts)
    words = sd.tokenizer.convert_ids_to_tokens(sd.tokenizer("a Robot, robot").input_ids)
    first = words.index("r")
    assert spans.shape == (2, sd.tokenizer.model_max_length, 2)
    assert spans[0, :, 0].nonzero().flatten().tolist() == [*range(first, first + 5), *range(first + 6, first + 11)]
    assert not spans[1].any() and not spans[0, :, 1].any()


def test_span_weights() -> None:
    spans = torch.tensor([[[False, False], [True, False], [True, True]]])
    both = span_weights(spans, torch.tensor([True, True]))
    assert both[0].tolist() == [[0.5, 0.5], [1.0, 0.0], [0.5, 0.5]]
    masked = span_weights(spans, torch.tensor([False, True]))
    assert masked[0].tolist() == [[0.0, 1.0]] * 3


def test_trigger_spans_act_on_text_tokens_only(sd: Any) -> None:
    composition = compose(sd, two_experts(sd), gate=TriggerSpans())
    with composition:
        generate(sd, "a robot and a bunny")
        trace = composition.trace()
        records = composition._context.records
        assert trace.weights and all(block.endswith(":text") for block in trace.weights)
        weights = next(iter(records.values())).probabilities
        spans = prompt_spans(sd, ["a robot and a bunny"], composition.experts)
        torch.testing.assert_close(weights, span_weights(spans, torch.tensor([True, True])))


def test_trigger_spans_need_triggers_that_differ(sd: Any) -> None:
    from dataclasses import replace

    robot, bunny = two_experts(sd)
    with pytest.raises(InvalidRequest, match="'bunny' has none"):
        compose(sd, [robot, replace(bunny, trigger=None)], gate=TriggerSpans())
    with pytest.raises(InvalidRequest, match="same trigger"):
        compose(sd, [robot, replace(bunny, trigger="ROBOT")], gate=TriggerSpans())


def test_prompts_must_be_known_and_fit(sd: Any) -> None:
    composition = compose(sd, two_experts(sd), gate=TriggerSpans())
    with composition, torch.no_grad():
        with pytest.raises(InvalidRequest, match=r"composition\.condition"):
            run_unet(sd)
        composition.condition(["a robot", "a bunny"], guidance=False)
        run_unet(sd, rows=4)
        with pytest.raises(InvalidRequest, match="2 prompts"):
            run_unet(sd, rows=3)
        composition.condition(["a robot"], guidance=True)
        with pytest.raises(InvalidRequest, match="with guidance, but 3 rows"):
            run_unet(sd, rows=3)


def test_pipeline_tells_prompts_guidance_and_pictures_per_prompt(pipe: Any) -> None:
    composition = compose(pipe, two_experts(pipe), gate=GateConfig(scope="token", text_prior=3.0))
    with composition:
        generate(pipe, ["a robot", "a bunny"], num_images_per_prompt=2)
        text = {key: record for key, record in composition._context.records.items() if key.endswith(":text")}
        weights = next(iter(text.values())).probabilities
        spans = prompt_spans(pipe, ["a robot", "a bunny"], composition.experts).repeat_interleave(2, 0)
        assert weights.shape == (4, pipe.tokenizer.model_max_length, 2)
        torch.testing.assert_close(weights, (3.0 * spans.float()).softmax(-1))
        generate(pipe, "a robot", guidance_scale=1.0)
        assert not composition._context.conditions.guidance


@pytest.mark.parametrize("scope", ["sample", "token"])
def test_unconditional_rows_reuse_the_conditional_weights(sd: Any, scope: Any) -> None:
    """Reuse: the unconditional half answers as if its gates had seen the conditional half."""
    composition = compose(sd, two_experts(sd), gate=GateConfig(scope=scope))
    randomise(composition)
    with composition, torch.no_grad():
        composition.condition(["a robot", "a bunny"], guidance=True)
        both = run_unet(sd, rows=4)
        for state in composition._context._states.values():
            assert state.probabilities.shape[0] == 2
        composition.condition(["a", "a", "a robot", "a bunny"], guidance=False)
        apart = run_unet(sd, rows=4)
    torch.testing.assert_close(both[2:], apart[2:], rtol=1e-4, atol=1e-4)
    assert not torch.allclose(both[:2], apart[:2], rtol=1e-4, atol=1e-4)


def test_own_rows_do_not_look_at_each_other(sd: Any) -> None:
    config = GateConfig(scope="token", guidance_rows="own")
    composition = compose(sd, two_experts(sd), gate=config)
    randomise(composition)
    with composition, torch.no_grad():
        composition.condition(["a robot"], guidance=True)
        both = run_unet(sd, rows=2)
        composition.condition(["nobody", "a robot"], guidance=False)
        torch.testing.assert_close(run_unet(sd, rows=2), both, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("scope", ["sample", "token"])
@pytest.mark.parametrize("scale", ["softmax", "null"])
def test_mask_redistributes(sd: Any, scope: Any, scale: Any) -> None:
    experts = [*two_experts(sd), make_expert(sd, "cat", seed=7)]
    composition = compose(sd, experts, gate=GateConfig(scope=scope, scale=scale))
    randomise(composition)
    with composition, torch.no_grad():
        composition.condition(["a robot"], guidance=False)
        run_unet(sd)
        first = next(iter(composition._context.records))
        full = composition._context.records[first].probabilities
        composition.mask("bunny")
        run_unet(sd)
        part = composition._context.records[first].probabilities
    assert not part[..., 1].any()
    torch.testing.assert_close(part[..., 0] / part[..., 2], full[..., 0] / full[..., 2], rtol=1e-3, atol=1e-4)
    if scale == "softmax":
        torch.testing.assert_close(part.sum(-1), torch.ones(part.shape[:-1]))


def test_the_timestep_is_a_feature(sd: Any) -> None:
    gate = BlockGate(8, 2, GateConfig())
    with torch.no_grad():
        for parameter in gate.parameters():
            parameter.normal_()
    x = torch.randn(1, 4, 8)
    one, two = (gate(x, time=torch.full((1, 64), value), pool=True) for value in (0.0, 1.0))
    assert not torch.allclose(one, two)
    assert BlockGate(8, 2, GateConfig(timestep=False)).time is None


def test_targets_outside_blocks_get_the_network_gate(sd: Any) -> None:
    composition = compose(sd, two_experts(sd, ("conv_in", "proj_in", "linear_1")), gate=GateConfig(scope="token"))
    assert composition.blocks == ("network",)
    randomise(composition)
    with composition, torch.no_grad():
        composition.condition(["a robot"], guidance=False)
        run_unet(sd)
        assert composition._context.records["network"].probabilities.shape == (2, 1, 2)


def test_trace_is_bounded_and_has_no_graph(sd: Any) -> None:
    composition = compose(sd, two_experts(sd), gate=GateConfig(scope="token", gain=True))
    randomise(composition)
    with composition:
        generate(sd, num_inference_steps=5)
        trace = composition.trace()
        assert trace.names == ("robot", "bunny") and trace.steps == 5 and trace.map_steps == (0, 1, 2, 3, 4)
        assert all(len(steps) == 5 and len(steps[0]) == 2 for steps in trace.weights.values())
        assert {maps[0].dtype for maps in trace.maps.values()} == {torch.float16}
        assert all(max(maps[0].shape[1:]) <= MAX_SIDE and not maps[0].requires_grad for maps in trace.maps.values())
        composition.record(False)
        generate(sd)
        assert composition.trace().steps == 0
        composition.record()
        composition.train()
        generate(sd)
        assert composition.trace().steps == 0
    recorder = Recorder()
    for _ in range(1000):
        recorder.add({"block": (torch.rand(1, 32 * 64, 2), (32, 64))})
    trace = recorder.trace(("a", "b"))
    assert len(trace.maps["block"]) <= MAX_MAPS and trace.maps["block"][0].shape == (2, 16, 16)
    assert trace.map_steps[:2] == (0, 16) and trace.steps == 1000


@pytest.mark.parametrize(
    "gate",
    [
        GateConfig(scope="token", scale="null", gain=True, hidden=8),
        StaticWeights({"*": (0.5, 0.5)}, learnable=True),
        nla(3),
        weighted_sum([0.5, 2.0]),
        learned_static(2),
        TriggerSpans("own"),
        GateConfig(granularity="layer", input="energy"),
        RouterConfig(rank=3, scope="sample"),
    ],
)
def test_settings_survive_json(gate: Any) -> None:
    assert gate_from_json(json.loads(json.dumps(gate_to_json(gate)))) == gate


BAD_SETTINGS: list[dict[str, Any]] = [
    {"kind": "magic"},
    {"kind": ["learned"]},
    {"kind": "learned", "scop": "token"},
    {"kind": "learned", "scope": "pixel"},
    {"kind": "learned", "granularity": "pixel"},
    {"kind": "learned", "granularity": "network", "scope": "token"},
    {"kind": "learned", "granularity": "matrix", "input": "expert_outputs"},
    {"kind": "learned", "input": "weights"},
    {"kind": "router", "rank": 0},
    {"kind": "router", "temperature": 0.0},
    {"kind": "router", "granularity": "block"},
    {"kind": "learned", "temperature": 0.0},
    {"kind": "learned", "temperature": float("nan")},
    {"kind": "learned", "hidden": 10**9},
    {"kind": "learned", "hidden": True},
    {"kind": "learned", "text_prior": "x"},
    {"kind": "learned", "scale": ["softmax"]},
    {"kind": "static", "weights": {"a": [1.0], "b": [1.0, 2.0]}},
    {"kind": "static", "weights": [1.0, float("inf")]},
    {"kind": "static", "weights": [1.0, 10**400]},
    {"kind": "static", "weights": [1.0, 1e300]},
    {"kind": "static", "weights": 7},
    {"kind": "static", "weights": {}},
    {"kind": "static"},
    {"kind": "trigger_spans", "guidance_rows": "both"},
]


@pytest.mark.parametrize("content", BAD_SETTINGS)
def test_bad_settings(content: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequest):
        gate_from_json(content)


def test_gate_flags_are_flags() -> None:
    with pytest.raises(InvalidRequest, match="gain"):
        GateConfig(gain=1)  # type: ignore[arg-type]


def test_text_encoder_span_option() -> None:
    """Encoder experts: NLA by default, trigger spans on request."""
    pipe = make_sd()
    experts = two_experts(pipe, ("q_proj", "fc1"))
    pictures = []
    for gate in (nla(2), GateConfig(scope="token"), GateConfig(scope="token", text_encoder="span"), TriggerSpans()):
        with compose(pipe, experts, gate=gate):
            pictures.append(generate(pipe))
    torch.testing.assert_close(pictures[0], pictures[1], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(pictures[2], pictures[3], rtol=1e-5, atol=1e-5)
    assert not torch.allclose(pictures[0], pictures[2], rtol=1e-4, atol=1e-4)
