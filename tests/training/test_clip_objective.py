"""The CLIP objective: exact terms, gradients into gates alone, memory spared, descent that finds the expert."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from mole_diffusion import Expert, compose
from mole_diffusion.composition import learned_static
from mole_diffusion.errors import InvalidRequest
from mole_diffusion.scoring import AlignmentScorer
from tests.tiny import tiny_clip
from tests.training.helpers import load, lora, same, subject, tensors_of
from training.config import parse
from training.objectives.clip import ClipObjective, cosine_distance, decode_small, mask_box, places
from training.objectives.collage import make_pool
from training.tasks.gate import ExpertEntry, GateTask, GateTrainingConfig
from training.validation import Scorers
from training.words import class_words

NAMES = ("robot", "alien")


@pytest.fixture(scope="module")
def scorer(tmp_path_factory: pytest.TempPathFactory) -> AlignmentScorer:
    return AlignmentScorer(f"local-dir:{tiny_clip(tmp_path_factory.mktemp('clip'))}", "tiny CLIP")


def settings(**options: Any) -> GateTrainingConfig:
    small = {"base": "tiny", "objective": "clip", "batch": 2, "pool": 6, "validation": 0, "lr": 0.02,
             "validate_prompts": 0}  # fmt: skip
    return parse(GateTrainingConfig, {**small, **options})


def make(folder: Path, work: Path, config: GateTrainingConfig, scorer: AlignmentScorer | None, **of: Any) -> GateTask:
    base, pipe = load(folder)
    experts = [Expert.load(lora(work, pipe, name, seed=seed, **of)) for seed, name in enumerate(NAMES, 1)]
    torch.manual_seed(0)
    composition = compose(pipe, experts, gate=config.gate(2), base=base).attach()
    return GateTask(config, base, pipe, composition, [subject(name) for name in NAMES], Scorers(scorer))


def test_cosine_distance_is_bounded_and_safe_at_zero() -> None:
    one = torch.tensor([3.0, 0.0], requires_grad=True)
    found = [cosine_distance(one, torch.tensor(v)) for v in ([2.0, 0.0], [0.0, 5.0], [-1.0, 0.0], [0.0, 0.0])]
    assert torch.allclose(torch.stack(found), torch.tensor([0.0, 1.0, 2.0, 1.0]), atol=1e-5)
    nothing = torch.zeros(4, requires_grad=True)
    cosine_distance(nothing, torch.ones(4)).backward()
    assert nothing.grad is not None and bool(torch.isfinite(nothing.grad).all())


def test_box_is_the_square_around_the_mask_inside_the_picture() -> None:
    mask = torch.zeros(8, 8)
    assert mask_box(mask) is None
    mask[2:6, 3:5] = 1.0
    assert mask_box(mask, margin=0.0) == (0.25, 0.25, 0.75, 0.75)
    mask[:] = 0
    mask[0, 0] = 1.0
    left, top, right, bottom = mask_box(mask) or ()
    assert (left, top) == (0.0, 0.0) and right == bottom == pytest.approx(0.125 * 1.16)


def test_places_are_cut_from_their_own_picture_with_gradients() -> None:
    pictures = torch.zeros(2, 3, 16, 16)
    pictures[1, :, 8:, 8:] = 0.75
    pictures.requires_grad_(True)
    cut = places(pictures, [1, 0], [(0.5, 0.5, 1.0, 1.0), (0.0, 0.0, 0.5, 0.5)], 4)
    assert torch.allclose(cut[0], torch.full((3, 4, 4), 0.75)) and torch.equal(cut[1], torch.zeros(3, 4, 4))
    cut[0].sum().backward()
    assert pictures.grad is not None
    assert pictures.grad[0].abs().max() == 0 and pictures.grad[1, :, :7, :7].abs().max() == 0
    assert pictures.grad[1, :, 9:, 9:].abs().max() > 0


def kept_bytes(function: Any) -> int:
    """What autograd keeps of a computation for the backward pass."""
    seen: dict[int, int] = {}
    with torch.autograd.graph.saved_tensors_hooks(
        lambda tensor: seen.update({tensor.data_ptr(): tensor.nbytes}) or tensor, lambda tensor: tensor
    ):
        function()
    return sum(seen.values())


def test_sparing_decodes_the_same_with_less_memory(base_folders: dict[str, Path], scorer: AlignmentScorer) -> None:
    base, pipe = load(base_folders["sd-v"])
    latents = torch.randn(2, 8, 8, 8, generator=torch.Generator().manual_seed(0)).requires_grad_(True)
    pictures, gradients = [], []
    for sparing in (False, True):
        pictures.append(decode_small(base, pipe, latents, 64, sparing=sparing))
        gradients.append(torch.autograd.grad(pictures[-1].square().sum(), latents)[0])
    assert pictures[0].shape == (2, 3, 64, 64)
    assert torch.allclose(*pictures, atol=1e-4) and torch.allclose(*gradients, rtol=1e-3, atol=1e-3)
    assert decode_small(base, pipe, latents, 32, sparing=True).shape == (2, 3, 32, 32)
    pool = make_pool(pipe, base, [subject(name) for name in NAMES], 2, 0)
    plain, saving = (
        ClipObjective(scorer, base, pipe, [subject(n) for n in NAMES], NAMES, (1.0, 1.0, 0.5), sparing=sparing)
        for sparing in (False, True)
    )
    one, two = (objective(latents, pool.masks, pool.prompts) for objective in (plain, saving))
    assert torch.allclose(one, two, atol=1e-5) and bool(((one > 0) & (one < 2)).all())
    spent, spared = (kept_bytes(lambda o=o: o(latents, pool.masks, pool.prompts)) for o in (plain, saving))
    assert spared < 0.2 * spent


def test_terms_are_weighted_and_scenes_speak_of_classes(base_folders: dict[str, Path], scorer: AlignmentScorer) -> None:
    base, pipe = load(base_folders["sd-v"])
    subjects = [subject(name) for name in NAMES]
    pool = make_pool(pipe, base, subjects, 3, 0)
    parts = [(1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.0, 0.0, 1.0), (2.0, 1.0, 1.0)]
    made = [ClipObjective(scorer, base, pipe, subjects, NAMES, weights) for weights in parts]
    with torch.no_grad():
        whole, local, direction, mixed = (item(pool.latents, pool.masks, pool.prompts) for item in made)
        pictures = base.decode(pipe, pool.latents)
        texts = [made[0].scene(prompt) for prompt in pool.prompts]
        expected = 1 - torch.diagonal(scorer.score(pictures, texts))
    assert torch.allclose(whole, expected, atol=1e-5)
    assert torch.allclose(mixed, (2 * whole + local + direction) / 4, atol=1e-6)
    assert made[0].scene("a zwx alien and a zwx robot on a beach") == "an alien and a robot on a beach"


def test_class_words_come_from_entry_expert_or_phrase(base_folders: dict[str, Path], tmp_path: Path) -> None:
    _, pipe = load(base_folders["sd-v"])
    expert = Expert.load(lora(tmp_path, pipe, "robot", seed=1))
    bare = replace(expert, metadata={}, trigger="zwx")
    named = ExpertEntry("0", "robot", class_name="toy")
    one = [subject("robot")]
    assert class_words([named], [expert], one) == ("toy",)
    assert class_words([], [expert], one) == ("robot",) == class_words([], [bare], one)
    assert class_words([], [replace(bare, trigger="zwx robot")], one) == ("zwx robot",)


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("sd-v", {"scope": "token", "alpha": 0.0}),
        ("sd-epsilon", {"method": "static", "balance": "none"}),
        ("sdxl", {"objective": "both", "balance": "entropy", "prompt_dropout": 0.3}),
    ],
)
def test_gradients_reach_gates_and_nothing_else(
    base_folders: dict[str, Path], kind: str, options: dict[str, Any], scorer: AlignmentScorer, tmp_path: Path
) -> None:
    task = make(base_folders[kind], tmp_path, settings(**options), scorer)
    frozen = [*scorer.model.parameters(), *task.pipe.vae.parameters(), *task.pipe.text_encoder.parameters()]
    base, before = tensors_of(task.pipe), [parameter.clone() for parameter in frozen]
    start = {key: value.clone() for key, value in task.composition.state_dict().items()}
    metrics = [task.step(index) for index in range(2)]
    assert all(0 <= step["clip"] < 2 and step["loss"] == step["loss"] for step in metrics)
    assert ("denoising" in metrics[0]) == (options.get("objective") == "both")
    assert ("balance" in metrics[0]) == (options.get("balance") != "none")
    assert not same(start, task.composition.state_dict())
    assert all(parameter.grad is None for parameter in frozen) and all(map(torch.equal, before, frozen))
    assert same(base, tensors_of(task.pipe))
    assert task.recipe()["scorers"] == {"trains": "tiny CLIP"}


def test_descent_raises_the_expert_that_the_model_prefers(
    base_folders: dict[str, Path], scorer: AlignmentScorer, tmp_path: Path
) -> None:
    """Two experts of one module, each the other's opposite: between them L_clip is close to a line."""
    base, pipe = load(base_folders["sd-v"])
    one = Expert.load(lora(tmp_path, pipe, "robot", seed=1, scale=2.0, targets=("up_blocks.1.resnets.1.conv1",)))
    other = replace(one, name="alien", trigger="zwx alien", sha256="0" * 64, metadata={}, modules={
        key: replace(pair, b=-pair.b) for key, pair in one.modules.items()
    })  # fmt: skip
    config = settings(clip_local=0.0, clip_direction=0.0, alpha=0.0, batch=6, lr=0.05)
    subjects, losses = [subject(name) for name in NAMES], []
    for weights in ((1.0, 0.0), (0.0, 1.0)):
        with compose(pipe, [one, other], gate=replace(learned_static(2), weights=weights), base=base) as fixed:
            losses.append(mean_clip(GateTask(config, base, pipe, fixed, subjects, Scorers(scorer))))
    right = int(losses[1] < losses[0])
    with compose(pipe, [one, other], gate=learned_static(2), base=base) as composition:
        task = GateTask(config, base, pipe, composition, subjects, Scorers(scorer))
        start = mean_clip(task)
        for index in range(10):
            task.step(index)
        assert mean_clip(task) < start
        table = composition.state_dict()["table"]
    assert bool((table[:, right] > table[:, 1 - right] + 0.2).all())


def mean_clip(task: GateTask) -> float:
    """L_clip of fixed draws."""
    from training.objectives.denoise import ask, draw_noise

    assert task.clip is not None
    texts = list(task.pool.prompts)
    noise, t = draw_noise(task.pool.latents.shape, 700, torch.Generator().manual_seed(5), task.device)
    task.composition.eval()
    task.composition.condition(texts, guidance=False)
    with torch.no_grad():
        answer = ask(task.pipe, task.base, task.pool.latents, noise, t, task.prompts.rows(texts))
        noisy = task.pipe.scheduler.add_noise(task.pool.latents, noise, t)
        clean = task.base.x0_from(task.pipe.scheduler, answer, noisy, t)
        return float(task.clip(clean, task.pool.masks, texts).mean())


def test_clip_needs_a_model_that_trains(base_folders: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match="needs an image-text model"):
        make(base_folders["sd-v"], tmp_path, settings(), None)
