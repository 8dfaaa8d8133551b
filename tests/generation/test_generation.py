from __future__ import annotations

import json
from pathlib import Path
from threading import Event
from typing import Any

import numpy as np
import pytest
import torch

from mole_diffusion.bases import Base, get_base
from mole_diffusion.composition import compose
from mole_diffusion.errors import Cancelled, InvalidRequest
from mole_diffusion.experts import Expert
from mole_diffusion.gates import GateConfig, TriggerSpans, nla
from mole_diffusion.generation import GenerationRequest, StepEvent, SubjectPrompt, generate
from mole_diffusion.sampling import guide, initial_noise, sample
from mole_diffusion.scoring.alignment import AlignmentScorer
from tests.tiny import tiny_lora, tiny_sd, tiny_sdxl

PROMPT = "a zwx robot and a zwx bunny"
MAKERS = {
    "epsilon": lambda: tiny_sd("epsilon"),
    "v": lambda: tiny_sd("v_prediction", zero_snr=False),
    "v zero snr": lambda: tiny_sd("v_prediction"),
    "sdxl": tiny_sdxl,
}


@pytest.fixture(scope="module", params=MAKERS)
def placed(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Base]:
    """A tiny pipeline of every kind, with the Base that its folder describes."""
    folder = tmp_path_factory.mktemp("base")
    MAKERS[request.param]().save_pretrained(folder)
    base = get_base(folder)
    return base.load(), base


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Base]:
    folder = tmp_path_factory.mktemp("demo")
    tiny_sd().save_pretrained(folder)
    base = get_base(folder)
    return base.load(), base


@pytest.fixture(scope="module")
def scorer(assets_folder: Path) -> AlignmentScorer:
    return AlignmentScorer(f"local-dir:{assets_folder}/demo/clip", "demo CLIP")


@pytest.fixture
def experts(demo: tuple[Any, Base], tmp_path: Path) -> list[Expert]:
    names = ("robot", "bunny")
    files = [tiny_lora(tmp_path / f"{name}.safetensors", demo[0], seed=seed) for seed, name in enumerate(names)]
    return [Expert.load(file, trigger=f"zwx {file.stem}") for file in files]


def _arrays(images: tuple[Any, ...]) -> np.ndarray:
    return np.stack([np.asarray(image, dtype=np.float32) for image in images]) / 255


@pytest.mark.parametrize(("guidance", "rescale", "negative"), [(1.0, 0.0, ""), (6.0, 0.0, "blurry"), (6.0, 0.7, "")])
def test_generate_equals_the_diffusers_pipeline(
    placed: tuple[Any, Base], guidance: float, rescale: float, negative: str
) -> None:
    pipe, base = placed
    request = GenerationRequest(
        PROMPT, negative, seed=5, steps=2, guidance=guidance, guidance_rescale=rescale, count=2, width=64, height=48
    )
    expected = pipe(
        [PROMPT] * 2,
        negative_prompt=[negative] * 2 if negative else None,
        latents=initial_noise(request.seeds, base.latent_shape(48, 64)),
        num_inference_steps=2,
        guidance_scale=guidance,
        guidance_rescale=rescale,
        height=48,
        width=64,
        output_type="pt",
    ).images
    result = generate(pipe, base, request)
    found = torch.from_numpy(_arrays(result.images)).permute(0, 3, 1, 2)
    assert float((found - expected).abs().max()) <= 0.5 / 255 + 1e-4, "exact up to the rounding of the PNG"


def test_latents_equal_the_diffusers_pipeline_exactly(placed: tuple[Any, Base]) -> None:
    pipe, base = placed
    noise = initial_noise([3], base.latent_shape())
    conditioning = base.encode(pipe, [PROMPT], negatives=[""])
    with torch.no_grad():
        *_, last = sample(pipe, noise, conditioning, 3, 6.0, 0.7)
    arguments = {"num_inference_steps": 3, "guidance_scale": 6.0, "guidance_rescale": 0.7, "output_type": "latent"}
    torch.testing.assert_close(last.latents, pipe(PROMPT, latents=noise, **arguments).images, atol=1e-4, rtol=1e-4)


def test_rescaled_guidance_has_the_spread_of_the_conditional_answer() -> None:
    unconditional, conditional = torch.randn(2, 4, 8, 8), torch.randn(2, 4, 8, 8)
    full = guide(unconditional, conditional, 7.0, 1.0)
    torch.testing.assert_close(full.std(dim=(1, 2, 3)), conditional.std(dim=(1, 2, 3)))
    torch.testing.assert_close(guide(unconditional, conditional, 1.0, 0.0), conditional)
    assert float(guide(unconditional, conditional, 7.0, 0.0).std()) > float(full.std())


def test_a_picture_depends_on_its_seed_alone(demo: tuple[Any, Base]) -> None:
    together = generate(*demo, GenerationRequest(PROMPT, seed=3, steps=2, count=3))
    alone = generate(*demo, GenerationRequest(PROMPT, seed=4, steps=2))
    np.testing.assert_allclose(_arrays(together.images)[1], _arrays(alone.images)[0], atol=1.01 / 255)
    assert together.parameters_of(1)["seed"] == 4 and together.parameters_of(1)["count"] == 1
    assert np.abs(_arrays(together.images)[0] - _arrays(together.images)[1]).max() > 0.01


def test_the_noise_of_a_seed_is_fixed() -> None:
    noise = initial_noise([0, 1], (2, 3, 3))
    torch.testing.assert_close(noise[1], torch.randn(2, 3, 3, generator=torch.Generator().manual_seed(1)))


def test_steps_are_seen_and_scored(demo: tuple[Any, Base], scorer: AlignmentScorer) -> None:
    seen: list[StepEvent] = []
    subjects = (SubjectPrompt("robot", "a robot"),)
    request = GenerationRequest(PROMPT, steps=5, subjects=subjects, score_every=2, preview_every=3)
    result = generate(*demo, request, scorer=scorer, on_step=seen.append)
    assert [event.step for event in seen] == [1, 2, 3, 4, 5] and {event.steps for event in seen} == {5}
    assert [bool(event.alignment) for event in seen] == [False, True, False, True, True]
    assert [event.preview is not None for event in seen] == [False, False, True, False, True]
    assert set(seen[-1].alignment) == {"prompt", "robot"} and seen[-1].preview.size == (64, 64)  # type: ignore[union-attr]
    assert [event.alignment for event in result.events] == [event.alignment for event in seen]
    assert all(event.preview is None for event in result.events), "a result does not hold every preview"
    assert set(result.scores[0]) == {"prompt", "robot"} and result.parameters["scorer"] == "demo CLIP"


def test_nothing_is_scored_or_shown_when_nobody_asks(demo: tuple[Any, Base]) -> None:
    result = generate(*demo, GenerationRequest(PROMPT, steps=2))
    assert result.scores == () and result.parameters["scorer"] is None
    assert all(not event.alignment for event in result.events) and result.seconds > 0


@pytest.mark.parametrize("after", [0, 2])
def test_cancel_stops_before_the_next_step(demo: tuple[Any, Base], after: int) -> None:
    cancel, steps = Event(), []

    def on_step(event: StepEvent) -> None:
        steps.append(event.step)
        if event.step == after:
            cancel.set()

    if after == 0:
        cancel.set()
    with pytest.raises(Cancelled):
        generate(*demo, GenerationRequest(PROMPT, steps=9), on_step=on_step, cancel=cancel)
    assert len(steps) == after


def test_the_pipeline_is_left_as_it_was(demo: tuple[Any, Base], experts: list[Expert]) -> None:
    pipe, base = demo
    keys, scheduler = list(pipe.unet.state_dict()), pipe.scheduler
    composition = compose(pipe, experts, gate=nla(2))
    before = _arrays(generate(pipe, base, GenerationRequest(PROMPT, steps=2)).images)
    generate(pipe, base, GenerationRequest(PROMPT, steps=2), composition=composition)
    assert not composition.attached and list(pipe.unet.state_dict()) == keys
    assert pipe.scheduler is scheduler and scheduler.num_inference_steps is None
    np.testing.assert_array_equal(before, _arrays(generate(pipe, base, GenerationRequest(PROMPT, steps=2)).images))


@pytest.mark.parametrize(
    ("gate", "guidance"),
    [
        (nla(2), 5.0),
        (GateConfig(), 1.0),
        (GateConfig(scope="token"), 5.0),
        (TriggerSpans(), 5.0),
        (TriggerSpans(), 1.0),
    ],
    ids=lambda value: type(value).__name__ if not isinstance(value, float) else str(value),
)
def test_compositions_take_part_attached_or_not(
    demo: tuple[Any, Base], experts: list[Expert], gate: Any, guidance: float
) -> None:
    pipe, base = demo
    request = GenerationRequest(PROMPT, steps=2, count=2, guidance=guidance)
    plain = _arrays(generate(pipe, base, request).images)
    composition = compose(pipe, experts, gate=gate)
    for_the_run = _arrays(generate(pipe, base, request, composition=composition).images)
    with composition:
        attached = generate(pipe, base, request, composition=composition)
        assert composition.attached, "who attached it detaches it"
        assert composition.trace().steps == 2
    np.testing.assert_allclose(for_the_run, _arrays(attached.images), atol=1.01 / 255)
    assert np.abs(for_the_run - plain).max() > 0.01, "the experts change the picture"


def test_all_experts_masked_is_the_base(demo: tuple[Any, Base], experts: list[Expert]) -> None:
    composition = compose(demo[0], experts)
    composition.mask("robot", "bunny")
    request = GenerationRequest(PROMPT, steps=2)
    masked = generate(*demo, request, composition=composition)
    np.testing.assert_array_equal(_arrays(masked.images), _arrays(generate(*demo, request).images))
    assert masked.parameters["composition"]["masked"] == ["robot", "bunny"]


def test_parameters_say_all_and_are_plain(
    demo: tuple[Any, Base], experts: list[Expert], scorer: AlignmentScorer
) -> None:
    request = GenerationRequest("robot " * 40, "blurry", seed=9, steps=2, guidance=3.0, count=2)
    result = generate(*demo, request, composition=compose(demo[0], experts, gate=nla(2)), scorer=scorer)
    parameters = json.loads(json.dumps(result.parameters))
    assert parameters == result.parameters
    expected = {"prompt": request.prompt, "negative": "blurry", "seed": 9, "steps": 2, "guidance": 3.0, "count": 2}
    assert expected.items() <= parameters.items()
    assert (parameters["width"], parameters["height"], parameters["guidance_rescale"]) == (64, 64, 0.7)
    assert [entry["sha256"] for entry in parameters["composition"]["experts"]] == [e.sha256 for e in experts]
    assert parameters["composition"]["gate"]["kind"] == "static" and len(parameters["composition"]["gate_sha256"]) == 64
    assert parameters["cut_off"].startswith("robot robot") and len(parameters["scores"]) == 2


@pytest.mark.parametrize(
    "wrong",
    [
        {"steps": 0},
        {"steps": 1001},
        {"count": 0},
        {"seed": -1},
        {"guidance": float("nan")},
        {"guidance_rescale": 2.0},
        {"subjects": (SubjectPrompt("a", "x"), SubjectPrompt("a", "y"))},
        {"subjects": (SubjectPrompt("prompt", "x"),)},
    ],
    ids=str,
)
def test_nonsense_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequest):
        GenerationRequest(PROMPT, **wrong)


def test_a_size_that_does_not_suit_the_base_is_refused(demo: tuple[Any, Base]) -> None:
    with pytest.raises(InvalidRequest, match="multiples of 8"):
        generate(*demo, GenerationRequest(PROMPT, width=65))
