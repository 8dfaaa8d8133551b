"""Composition without training: weights over steps, Switch, Composite, K-LoRA, plain sums in regions."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mole_diffusion import KLora, LoraComposite, LoraSwitch, ScheduledWeights, StaticWeights, compose, load_composition
from mole_diffusion.composition import weighted_sum
from mole_diffusion.errors import InvalidRequest
from mole_diffusion.experts import Expert, LowRank
from mole_diffusion.gates import ScheduleGate
from mole_diffusion.gates.composite import mean_of
from mole_diffusion.gates.config import gate_from_json, gate_to_json
from mole_diffusion.gates.klora import TopK, top_sums
from mole_diffusion.gates.schedule import average, keyframed
from mole_diffusion.gates.switch import turn
from mole_diffusion.sampling import guide
from tests.core.small import SD_TARGETS, generate, make_expert, make_sd

TARGETS = (*SD_TARGETS, "conv1", "proj_in", "fc1")
EARLY_LATE = ((0.0, (1.0, 0.0)), (0.5, (0.0, 0.8)))
GATES: dict[str, Any] = {
    "hold": ScheduledWeights(EARLY_LATE),
    "linear": ScheduledWeights(((0.2, {"*": (1.0, 0.5), "network": (0.0, 1.0)}), (0.9, (0.0, 2.0))), "linear", False),
    "switch": LoraSwitch(2, (1.0, 0.7)),
    "composite": LoraComposite(weights=(0.5, 1.5)),
    "klora": KLora(alpha=2.0, beta=0.1, granularity="layer"),
}


@pytest.fixture(scope="module")
def sd() -> Any:
    """One for all: compositions leave nothing behind."""
    return make_sd()


gates = pytest.mark.parametrize("gate", GATES.values(), ids=GATES.keys())


def pair(pipe: Any, targets: tuple[str, ...] = TARGETS) -> list[Expert]:
    return [
        make_expert(pipe, "robot", seed=1, targets=targets, size=0.1),
        make_expert(pipe, "bunny", seed=2, targets=targets, size=0.1, rank=3),
    ]


def call(pipe: Any, time: int | Tensor = 500, rows: int = 2, **more: Any) -> Any:
    random = torch.Generator().manual_seed(4)
    text = torch.randn(rows, pipe.tokenizer.model_max_length, 24, generator=random)
    noise = torch.randn(rows, 4, 8, 8, generator=random)
    found = pipe.unet(noise, torch.as_tensor(time), encoder_hidden_states=text, **more)
    return found[0] if isinstance(found, tuple) else found.sample


def alone(pipe: Any, experts: Sequence[Expert], weights: Sequence[float], time: int | Tensor = 500) -> Tensor:
    with compose(pipe, experts, gate=weighted_sum(weights)), torch.no_grad():
        return call(pipe, time)


def close(one: Tensor, other: Tensor) -> None:
    torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


# Every one of them.


@gates
def test_settings_survive_json(gate: Any) -> None:
    assert gate_from_json(json.loads(json.dumps(gate_to_json(gate)))) == gate


@gates
def test_all_masked_is_the_base_and_merging_is_refused(sd: Any, gate: Any) -> None:
    base, state = generate(sd), set(sd.unet.state_dict())
    with compose(sd, pair(sd), gate=gate) as composition:
        assert not torch.equal(generate(sd), base)
        composition.mask("robot", "bunny")
        assert torch.equal(generate(sd), base)
        with pytest.raises(InvalidRequest, match="Only static weights"):
            composition.merge()
    assert torch.equal(generate(sd), base) and set(sd.unet.state_dict()) == state


@gates
def test_saved_and_loaded_is_identical(sd: Any, gate: Any, tmp_path: Path) -> None:
    experts = pair(sd)
    composition = compose(sd, experts, gate=gate)
    file = composition.save(tmp_path / "pair.safetensors")
    with composition:
        picture, trace = generate(sd), composition.trace()
    loaded = load_composition(file, sd, {expert.sha256: expert for expert in experts})
    assert loaded.config == gate
    with loaded:
        assert torch.equal(generate(sd), picture) and loaded.trace() == trace


@gates
def test_one_left_over_works_on_the_pipeline_and_a_subset_is_a_mask(sd: Any, gate: Any) -> None:
    with compose(sd, pair(sd), gate=gate) as composition, torch.no_grad():
        composition.mask("bunny")
        composition.condition(None, guidance=False)
        masked = call(sd)
        composition.unmask()
        composition.condition(None, guidance=False, subsets=[["robot"], ["robot"]])
        close(call(sd), masked)
        composition.condition(None, guidance=False, subsets=[[], ["robot"]])
        part = call(sd)
    close(part, torch.cat([call(sd)[:1], masked[1:]]))


BAD_SETTINGS: list[dict[str, Any]] = [
    {"kind": "scheduled"},
    {"kind": "scheduled", "keyframes": []},
    {"kind": "scheduled", "keyframes": 7},
    {"kind": "scheduled", "keyframes": [[0.0]]},
    {"kind": "scheduled", "keyframes": [[0.0, 7]]},
    {"kind": "scheduled", "keyframes": [[1.5, [1.0]]]},
    {"kind": "scheduled", "keyframes": [["a", [1.0]]]},
    {"kind": "scheduled", "keyframes": [[0.5, [1.0]], [0.5, [2.0]]]},
    {"kind": "scheduled", "keyframes": [[0.0, [float("nan")]]]},
    {"kind": "scheduled", "keyframes": [[0.0, [1.0]]], "interpolate": "cubic"},
    {"kind": "scheduled", "keyframes": [[0.0, [1.0]]], "redistribute": 1},
    {"kind": "scheduled", "keyframes": [[i / 2000, [1.0]] for i in range(1001)]},
    {"kind": "switch", "every": 0},
    {"kind": "switch", "every": 1.5},
    {"kind": "switch", "weights": "ab"},
    {"kind": "composite", "weights": 3},
    {"kind": "composite", "weights": [True]},
    {"kind": "klora", "granularity": "block"},
    {"kind": "klora", "alpha": -1.0},
    {"kind": "klora", "beta": float("inf")},
]


@pytest.mark.parametrize("content", BAD_SETTINGS)
def test_bad_settings(content: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequest):
        gate_from_json(content)


@pytest.mark.parametrize(
    "gate", [ScheduledWeights(((0.0, (1.0,)),)), LoraSwitch(weights=(1.0,)), LoraComposite((1.0,))]
)
def test_weights_are_one_per_expert(sd: Any, gate: Any) -> None:
    with pytest.raises(InvalidRequest, match="each of 2 gated experts, got 1"):
        compose(sd, pair(sd), gate=gate)


# Weights over steps.


def test_keyframes() -> None:
    times, table = torch.tensor([0.2, 0.6]), torch.tensor([[1.0, 0.0], [0.0, 4.0]])
    now = torch.tensor([0.0, 0.2, 0.3, 0.6, 1.0])
    assert keyframed(times, table, now, "hold").tolist() == [[1.0, 0.0]] * 3 + [[0.0, 4.0]] * 2
    close(keyframed(times, table, now, "linear"), torch.tensor([[1.0, 0], [1, 0], [0.75, 1], [0, 4], [0, 4]]))
    fine = torch.linspace(0.0, 1.0, 100_001)
    for kind in ("hold", "linear"):
        mean = keyframed(times, table, fine, kind).mean(0)
        torch.testing.assert_close(average(times, table, kind), mean, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    ("interpolate", "time", "weights"),
    [
        ("hold", 999, (1.0, 0.0)),
        ("hold", 501, (1.0, 0.0)),
        ("hold", 500, (0.0, 0.8)),
        ("hold", 0, (0.0, 0.8)),
        ("linear", 750, (0.5, 0.4)),
        ("linear", 100, (0.0, 0.8)),
    ],
)
def test_a_step_has_its_weights(sd: Any, interpolate: Any, time: int, weights: tuple[float, float]) -> None:
    experts = pair(sd, SD_TARGETS)
    expected = alone(sd, experts, weights, time)
    gate = ScheduledWeights(EARLY_LATE, interpolate, redistribute=False)
    with compose(sd, experts, gate=gate) as composition, torch.no_grad():
        close(call(sd, time), expected)
        traced = composition.trace().weights
    assert all(steps[0] == pytest.approx(weights) for steps in traced.values())


def test_every_row_has_its_own_timestep(sd: Any) -> None:
    experts = pair(sd, SD_TARGETS)
    times = torch.tensor([900, 100])
    with compose(sd, experts, gate=ScheduledWeights(EARLY_LATE)), torch.no_grad():
        both = call(sd, times)
    close(both[:1], alone(sd, experts, (1.0, 0.0), times)[:1])
    close(both[1:], alone(sd, experts, (0.0, 0.8), times)[1:])


def test_a_masked_experts_weight_is_shared_out_or_not(sd: Any) -> None:
    frames = ((0.0, (0.5, 1.5)),)
    for redistribute, weight in ((True, 2.0), (False, 0.5)):
        with compose(sd, pair(sd), gate=ScheduledWeights(frames, redistribute=redistribute)) as composition:
            composition.mask("bunny")
            generate(sd)
            weights = composition.trace().weights
            assert len(weights) > 3 and all(steps == [[weight, 0.0]] * 2 for steps in weights.values())


def test_text_encoders_get_the_mean(sd: Any) -> None:
    experts = pair(sd, ("fc1",))
    with compose(sd, experts, gate=weighted_sum([0.5, 0.4])):
        expected = generate(sd)
    with compose(sd, experts, gate=ScheduledWeights(EARLY_LATE)):
        close(generate(sd), expected)


# LoRA Switch.


def test_turns_go_round_among_the_active() -> None:
    mask = torch.tensor([True, False, True, True])
    assert [int(turn(mask, number).int().argmax()) for number in range(5)] == [0, 2, 3, 0, 2]
    assert not turn(torch.zeros(3, dtype=torch.bool), 1).any()


def test_switch_gives_each_step_to_one_expert(sd: Any) -> None:
    experts = [*pair(sd), make_expert(sd, "cat", seed=7, targets=TARGETS, size=0.1)]
    lonely = [alone(sd, experts, [float(i == j) for j in range(3)]) for i in range(3)]
    with compose(sd, experts, gate=LoraSwitch(every=2)) as composition, torch.no_grad():
        for step in range(8):
            close(call(sd), lonely[step // 2 % 3])
        composition.mask("bunny")
        composition.condition(None, guidance=False)
        for step in range(6):
            close(call(sd), lonely[(0, 2)[step // 2 % 2]])
        trace = composition.trace().weights
    assert all(steps == [[1, 0, 0]] * 2 + [[0, 0, 1]] * 2 + [[1, 0, 0]] * 2 for steps in trace.values())


# LoRA Composite.


def test_composite_is_the_mean_of_the_experts_alone(sd: Any) -> None:
    experts = pair(sd)
    lonely = [alone(sd, experts, weights) for weights in ((0.5, 0.0), (0.0, 1.5))]
    assert not torch.allclose(lonely[0], lonely[1], atol=1e-3)
    gate = LoraComposite(weights=(0.5, 1.5))
    with compose(sd, experts, gate=gate) as composition, torch.no_grad():
        close(call(sd), (lonely[0] + lonely[1]) / 2)
        close(call(sd, return_dict=False), (lonely[0] + lonely[1]) / 2)
        assert all(steps == [[0.25, 0.75]] * 2 for steps in composition.trace().weights.values())


def test_mean_of_guided_answers_is_the_guided_mean(sd: Any) -> None:
    experts = pair(sd, SD_TARGETS)
    lonely = [
        guide(*alone(sd, experts, weights).chunk(2), scale=7.5, rescale=0.0) for weights in ((1.0, 0.0), (0.0, 1.0))
    ]
    with compose(sd, experts, gate=LoraComposite()) as composition, torch.no_grad():
        composition.condition(None, guidance=True)
        guided = guide(*call(sd).chunk(2), scale=7.5, rescale=0.0)
    torch.testing.assert_close(guided, (lonely[0] + lonely[1]) / 2, rtol=1e-5, atol=1e-4)


def test_masked_experts_cost_no_pass(sd: Any) -> None:
    experts = pair(sd)
    lonely = alone(sd, experts, (0.0, 1.0))
    passes: list[int] = []
    with compose(sd, experts, gate=LoraComposite()) as composition, torch.no_grad():
        watched = sd.unet.conv_in.register_forward_hook(lambda *_: passes.append(1))
        call(sd)
        assert len(passes) == 2 and composition.trace().steps == 1
        composition.mask("robot")
        assert torch.equal(call(sd), lonely) and len(passes) == 3
        watched.remove()


def test_rows_average_over_their_own_experts(sd: Any) -> None:
    experts = pair(sd)
    one, two = (alone(sd, experts, weights) for weights in ((1.0, 0.0), (0.0, 1.0)))
    with compose(sd, experts, gate=LoraComposite()) as composition, torch.no_grad():
        composition.condition(None, guidance=False, subsets=[["bunny"], ["robot", "bunny"]])
        close(call(sd), torch.cat([two[:1], (one + two)[1:] / 2]))


def test_a_failed_pass_leaves_nothing_behind(sd: Any) -> None:
    experts = pair(sd)
    with compose(sd, experts, gate=LoraComposite()), torch.no_grad():
        picture = generate(sd)
        broken = sd.unet.conv_out.register_forward_hook(_fail)
        with pytest.raises(RuntimeError, match="out of memory"):
            call(sd)
        broken.remove()
        assert torch.equal(generate(sd), picture)


def _fail(*_: Any) -> None:
    raise RuntimeError("out of memory")


def test_an_always_on_expert_is_in_every_pass(sd: Any) -> None:
    style = make_expert(sd, "style", seed=9, targets=TARGETS, size=0.1)
    experts = [*pair(sd), style]
    lonely = [alone(sd, experts, weights) for weights in ((1, 0, 1), (0, 1, 1), (0, 0, 1))]
    with compose(sd, experts, gate=LoraComposite(), outside=["style"]) as composition, torch.no_grad():
        close(call(sd), (lonely[0] + lonely[1]) / 2)
        composition.mask("robot", "bunny")
        close(call(sd), lonely[2])


def test_means_need_tensors() -> None:
    half = torch.tensor([0.5])
    one, two = ({"a": torch.ones(2, 3)}, None), ({"a": torch.zeros(2, 3)}, None)
    assert mean_of([one, two], [half, half])[0]["a"].tolist() == [[0.5] * 3] * 2
    with pytest.raises(InvalidRequest, match="use_cache=False"):
        mean_of([object(), object()], [half, half])


# K-LoRA.


def test_top_sums() -> None:
    first = LowRank(torch.tensor([[1.0, -2.0]]), torch.tensor([[3.0], [-1.0]]), scale=0.5)
    second = LowRank(torch.eye(2), torch.tensor([[1.0, 0.0], [0.0, -4.0]]))
    sums, totals = top_sums(first, second, torch.device("cpu"))  # |ΔW| = 1.5 3 0.5 1 and 1 0 0 4, K = 1·2
    assert (sums.tolist(), totals.tolist()) == ([4.5, 5.0], [6.0, 5.0])
    assert top_sums(None, second, torch.device("cpu"))[0].tolist() == [0.0, 5.0]


def expected_choice(experts: Sequence[Expert], key: str, progress: float) -> list[float]:
    """The paper's rule, from the whole matrices."""
    subject, style = ([expert.modules[key].delta().abs() for expert in experts][i] for i in (0, 1))
    most = experts[0].modules[key].rank * experts[1].modules[key].rank
    totals = [sum(float(m.delta().abs().sum()) for m in expert.modules.values()) for expert in experts]
    tops = [float(side.flatten().sort(descending=True).values[:most].sum()) for side in (subject, style)]
    wins = tops[0] > (1.5 * progress + 0.5) * totals[0] / totals[1] * tops[1]
    return [1.0, 0.0] if wins else [0.0, 1.0]


def test_klora_chooses_per_matrix_and_step(sd: Any) -> None:
    experts = pair(sd, SD_TARGETS)
    with compose(sd, experts, gate=KLora()) as composition, torch.no_grad():
        for time in (900, 600, 100):
            call(sd, time)
        trace = composition.trace().weights
    keys = list(experts[0].modules)
    assert set(trace) == {key.removeprefix("unet.") for key in keys}
    for key in keys:
        chosen = [expected_choice(experts, key, progress) for progress in (0.1, 0.4, 0.9)]
        assert trace[key.removeprefix("unet.")] == chosen
    shares = [sum(steps[step][1] for steps in trace.values()) for step in range(3)]
    assert 0 < shares[1] < len(keys) and shares[0] < shares[1] < shares[2]


def test_klora_applies_what_it_chose(sd: Any) -> None:
    experts = pair(sd, SD_TARGETS)
    taken = {key: experts[int(expected_choice(experts, key, 0.4)[1])].modules[key] for key in experts[0].modules}
    expected = alone(sd, [Expert("taken", taken)], [1.0], 600)
    with compose(sd, experts, gate=KLora()), torch.no_grad():
        close(call(sd, 600), expected)


def test_a_scale_of_the_file_does_not_decide(sd: Any) -> None:
    """γ: an expert that is louder everywhere wins nowhere by that."""
    experts = pair(sd, SD_TARGETS)
    loud = replace(
        experts[1], modules={key: replace(m, scale=m.scale * 10) for key, m in experts[1].modules.items()}, sha256=""
    )
    ratios = [_topk(sd, [experts[0], other]).ratios(torch.device("cpu")) for other in (experts[1], loud)]
    close(ratios[0], ratios[1])


def _topk(pipe: Any, experts: list[Expert], gate: KLora | None = None) -> TopK:
    found = compose(pipe, experts, gate=gate or KLora()).gate
    assert isinstance(found, ScheduleGate) and isinstance(found.schedule, TopK)
    assert not found.state_dict()  # nothing to save: it follows from the experts
    return found.schedule


def test_modules_of_one_expert_take_that_one(sd: Any) -> None:
    experts = [*pair(sd, ("to_q",))[:1], *pair(sd, ("to_v",))[1:]]
    with compose(sd, experts, gate=KLora()) as composition, torch.no_grad():
        call(sd)
        trace = composition.trace().weights
    assert all(steps == [[float("to_q" in name), float("to_v" in name)]] for name, steps in trace.items())


def test_layers_choose_together(sd: Any) -> None:
    experts = pair(sd, ("to_q", "to_k"))
    matrices, layers = (_topk(sd, experts, KLora(granularity=kind)) for kind in ("matrix", "layer"))
    assert len(layers.plan.blocks) * 2 == len(matrices.plan.blocks) == len(matrices.ratios(torch.device("cpu")))
    both = [top_sums(*pairs, torch.device("cpu"))[0] for pairs in _pairs(*experts)]
    whole = torch.stack([query + key for query, key in zip(both[::2], both[1::2], strict=True)])
    found = layers.ratios(torch.device("cpu"))
    torch.testing.assert_close(found / found[0], (whole[:, 0] / whole[:, 1]) / (whole[0, 0] / whole[0, 1]))


def _pairs(one: Expert, other: Expert) -> list[tuple[LowRank, LowRank]]:
    return [(one.modules[key], other.modules[key]) for key in one.modules]


def test_the_role_says_who_is_the_style(sd: Any) -> None:
    robot, bunny = pair(sd)
    style = replace(robot, role="style")
    assert [(t.subject, t.style) for t in (_topk(sd, [robot, bunny]), _topk(sd, [style, bunny]))] == [(0, 1), (1, 0)]
    with compose(sd, [style, bunny], gate=KLora(alpha=0.0, beta=0.0)) as composition, torch.no_grad():
        call(sd)
        assert all(steps == [[0.0, 1.0]] for steps in composition.trace().weights.values())


def test_klora_is_for_two_plain_loras(sd: Any) -> None:
    robot, bunny = pair(sd)
    with pytest.raises(InvalidRequest, match=r"two experts.*here are 1 \(robot\)"):
        compose(sd, [robot], gate=KLora())
    key, module = next(iter(bunny.modules.items()))
    dora = replace(bunny, modules={key: replace(module, magnitude=torch.ones(module.b.shape[0]))})
    with pytest.raises(InvalidRequest, match="'bunny' is DoRA"):
        compose(sd, [robot, dora], gate=KLora())


# Plain sums in regions.


@pytest.mark.parametrize("gate", [weighted_sum([1.0, 1.0]), LoraSwitch(), LoraComposite()])
@pytest.mark.parametrize("path", ["attn1.to_q", "attn2.to_out.0", "ff.net.2", "conv1"])
def test_outside_its_box_an_expert_adds_exactly_nothing(sd: Any, gate: Any, path: str) -> None:
    robot = make_expert(sd, "robot", seed=1, targets=(path,))
    other = make_expert(sd, "other", seed=2, targets=("time_emb_proj",), size=0.0)
    changes: list[Tensor] = []

    def compare(layer: Any, args: tuple[Tensor, ...], output: Tensor) -> None:
        change = output - layer.base(*args)
        side = int(change.shape[1] ** 0.5)
        changes.append(change if change.ndim == 4 else change.mT.unflatten(-1, (side, side)))

    with compose(sd, [robot, other], gate=gate) as composition, torch.no_grad():
        composition.place({"robot": (0.0, 0.0, 0.5, 1.0)}, floor=0.0)
        composition.condition(None, guidance=False)
        watched = [m.register_forward_hook(compare) for n, m in sd.unet.named_modules() if n.endswith(f".{path}")]
        call(sd)
        for handle in watched:
            handle.remove()
    assert changes
    first = changes[: len(changes) // 2] if isinstance(gate, LoraComposite) else changes  # then the other one's pass
    for change in first:
        middle = change.shape[-1] // 2
        assert not change[..., middle:].any()
        assert bool(change[..., :middle].abs().sum((0, 1)).all())


def test_only_what_is_free_may_be_cut(sd: Any) -> None:
    box = {"robot": (0.0, 0.0, 0.5, 1.0)}
    compose(sd, pair(sd), gate=ScheduledWeights(EARLY_LATE, redistribute=False)).place(box, floor=0.0)
    for gate in (ScheduledWeights(EARLY_LATE), StaticWeights((0.5, 0.5))):
        with pytest.raises(InvalidRequest, match="floor"):
            compose(sd, pair(sd), gate=gate).place(box, floor=0.0)
