"""The gate task on tiny bases: only gates learn, resume is exact, validation keeps the best, both families work."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mole_diffusion import Expert, StaticWeights, compose, load_composition
from mole_diffusion.errors import InvalidRequest
from mole_diffusion.experts import read_tensors
from mole_diffusion.persist import read_composition_header
from tests.training.helpers import load, lora, same, subject, tensors_of
from tests.training.test_loop import StopAfter
from training.config import parse
from training.control import Commands
from training.events import MemorySink, Progress, Sample
from training.loop import Schedule, run
from training.objectives.collage import make_pool
from training.objectives.held_out import held_out_collage_loss
from training.ranks import Ranks
from training.tasks.gate import GateTask, GateTrainingConfig

NAMES = ("robot", "alien")
CONVOLUTIONS = {"targets": ("to_q", "to_v", "to_out.0", "ff.net.2", "conv1")}


def config(**options: object) -> GateTrainingConfig:
    small = {"base": "tiny", "steps": 4, "batch": 2, "pool": 8, "validation": 4, "validate_every": 2, "stop_on": "loss"}
    return parse(GateTrainingConfig, {**small, **options})


def experts(folder: Path, pipe: Any, **options: Any) -> list[Expert]:
    return [Expert.load(lora(folder, pipe, name, seed=seed, **options)) for seed, name in enumerate(NAMES, 1)]


def make(base_folder: Path, folder: Path, settings: GateTrainingConfig, **options: Any) -> GateTask:
    base, pipe = load(base_folder)
    torch.manual_seed(0)
    composition = compose(pipe, experts(folder, pipe, **options), gate=settings.gate(2), base=base).attach()
    return GateTask(settings, base, pipe, composition, [subject(name) for name in NAMES])


def train(task: GateTask, folder: Path, control: Commands | None = None, **options: Any):
    sink = MemorySink()
    outcome = run(task, sink, control or Commands(), folder / "c", out=folder / "both.safetensors", **options)
    return outcome, sink


@pytest.mark.parametrize("kind", ["sd-v", "sdxl"])
@pytest.mark.parametrize(
    "options",
    [
        {"scope": "sample"},
        {"scope": "token", "scale": "null", "gain": True},
        {"scope": "token", "scale": "sigmoid", "alpha": 0.0},
        {"method": "static", "balance": "entropy"},
    ],
    ids=lambda options: "-".join(map(str, options.values())),
)
def test_only_gates_learn(base_folders: dict[str, Path], kind: str, options: dict, tmp_path: Path) -> None:
    base, pipe = load(base_folders[kind])
    before = tensors_of(pipe)
    both = experts(tmp_path, pipe, **CONVOLUTIONS)
    pairs = [pair.delta() for expert in both for pair in expert.modules.values()]
    settings = config(**options)
    with compose(pipe, both, gate=settings.gate(2), base=base) as composition:
        start = {key: value.clone() for key, value in composition.state_dict().items()}
        task = GateTask(settings, base, pipe, composition, [subject(name) for name in NAMES])
        steps = [task.step(index) for index in range(2)]
        assert all(np.isfinite(list(metrics.values())).all() for metrics in steps)
        assert not same(start, composition.state_dict())
        assert all(parameter.grad is None for parameter in pipe.unet.parameters() if not parameter.requires_grad)
    assert same(before, tensors_of(pipe))
    after = [pair.delta() for expert in both for pair in expert.modules.values()]
    assert all(map(torch.equal, pairs, after))


def test_resumed_equals_uninterrupted(base_folders: dict[str, Path], tmp_path: Path) -> None:
    settings = config(scope="token", lr=1e-2, steps=5, prompt_dropout=0.3)
    whole = make(base_folders["sd-v"], tmp_path, settings)
    first, _ = train(whole, tmp_path / "whole")
    train(make(base_folders["sd-v"], tmp_path, settings), tmp_path / "parts", StopAfter(3))
    torch.manual_seed(77)
    resumed = make(base_folders["sd-v"], tmp_path, settings)
    second, sink = train(resumed, tmp_path / "parts")
    assert [event.step for event in sink.of(Progress)] == [4, 5]
    assert same(whole.composition.state_dict(), resumed.composition.state_dict())
    assert {**first.result, "path": 0} == {**second.result, "path": 0}
    one, two = (tmp_path / part / "both.safetensors" for part in ("whole", "parts"))
    assert same(read_tensors(one), read_tensors(two))
    assert read_composition_header(one)["recipe"] == read_composition_header(two)["recipe"]


def test_gradient_checkpointing_changes_nothing(base_folders: dict[str, Path], tmp_path: Path) -> None:
    settings = config(scope="token", lr=1e-2, validation=0, validate_prompts=0, stop_on=None)
    plain, saving = (make(base_folders["sdxl"], tmp_path, settings) for _ in range(2))
    saving.pipe.unet.enable_gradient_checkpointing()
    for index in range(2):
        one, two = plain.step(index), saving.step(index)
        assert one == pytest.approx(two, rel=1e-4)
    other = saving.composition.state_dict()
    for name, value in plain.composition.state_dict().items():
        assert torch.allclose(value, other[name], atol=1e-4), name


def test_checkpoint_of_other_settings_is_refused(base_folders: dict[str, Path], tmp_path: Path) -> None:
    settings = config()
    train(make(base_folders["sd-v"], tmp_path, settings), tmp_path, StopAfter(1))
    with pytest.raises(InvalidRequest, match="other settings"):
        train(make(base_folders["sd-v"], tmp_path, replace(settings, alpha=0.1)), tmp_path)


def test_saved_composition_has_the_best_gates_and_its_recipe(base_folders: dict[str, Path], tmp_path: Path) -> None:
    settings = config(lr=0.5, steps=3, validate_every=1)  # far too fast: later gates are worse than some earlier ones
    task = make(base_folders["sd-v"], tmp_path, settings)
    outcome, sink = train(task, tmp_path, schedule=Schedule(sample_every=3))
    losses = [task.start["start_loss"], *(event.metrics["held_out_loss"] for event in sink.of(Progress))]
    assert outcome.result["held_out_loss"] == min(losses)  # type: ignore[type-var]
    assert outcome.result["best_step"] == int(np.argmin(losses))  # type: ignore[arg-type]
    both = {expert.sha256: expert for expert in task.composition.experts}
    base, pipe = load(base_folders["sd-v"])
    loaded = load_composition(tmp_path / "both.safetensors", pipe, both, base)
    assert loaded.recipe["objective"] == "collage" and loaded.recipe["lr"] == 0.5
    assert same(loaded.state_dict(), task.composition.state_dict())
    pictures = sink.of(Sample)
    assert [event.step for event in pictures] == [0, 3] and Path(pictures[0].path).is_file()
    assert "zwx robot" in pictures[0].prompt and "zwx alien" in pictures[0].prompt


def test_gates_learn_to_prefer_the_useful_expert(base_folders: dict[str, Path], tmp_path: Path) -> None:
    """One expert is trained on the scenes' subjects, the other is noise: the gates must find out."""
    base, pipe = load(base_folders["sd-v"])
    good = _trained_expert(base_folders["sd-v"], tmp_path)
    bad = Expert.load(lora(tmp_path, pipe, "alien", seed=5, scale=3.0, rank=8))
    settings = config(scope="sample", steps=25, batch=3, lr=0.05, alpha=0.0, validate_every=25)
    with compose(pipe, [good, bad], gate=settings.gate(2), base=base) as composition:
        task = GateTask(settings, base, pipe, composition, [subject(name) for name in NAMES])
        for index in range(25):
            task.step(index)
        assert -task.best.value < 0.97 * task.start["start_loss"]
        held_out = make_pool(pipe, base, task.subjects, 6, 99)
        composition.eval()
        learned = held_out_collage_loss(composition, pipe, base, held_out, draws=2)
        composition.mask("alien")
        alone = held_out_collage_loss(composition, pipe, base, held_out, draws=2)
    nla = compose(pipe, [good, bad], gate=StaticWeights((0.5, 0.5)), base=base)
    uniform = held_out_collage_loss(nla, pipe, base, held_out, draws=2)
    assert (learned < uniform).all()  # paired: on every scene
    assert learned.mean() < uniform.mean() - 0.5 * (uniform.mean() - alone.mean())


def _trained_expert(base_folder: Path, folder: Path) -> Expert:
    from training.tasks.subject import SubjectConfig, SubjectTask

    base, pipe = load(base_folder)
    values = {
        "base": "tiny",
        "token": "zwx",
        "class": "robot",
        "steps": 20,
        "batch": 4,
        "rank": 4,
        "pool": 8,
        "lr": 1e-2,
    }
    task = SubjectTask(parse(SubjectConfig, values), base, pipe, subject("robot"))
    for index in range(20):
        task.step(index)
    task.finish(folder / "good.safetensors")
    return Expert.load(folder / "good.safetensors", name="robot")


def test_held_out_loss_is_paired_and_repeatable(base_folders: dict[str, Path], tmp_path: Path) -> None:
    base, pipe = load(base_folders["sd-epsilon"])
    pool = make_pool(pipe, base, [subject(name) for name in NAMES], 5, 3)
    with compose(pipe, experts(tmp_path, pipe), gate=StaticWeights((0.5, 0.5)), base=base) as composition:
        one = held_out_collage_loss(composition, pipe, base, pool, draws=2)
        again = held_out_collage_loss(composition, pipe, base, pool, draws=2, batch=5)
        on_subjects = held_out_collage_loss(composition, pipe, base, pool, draws=2, on_subjects=True)
        composition.mask("robot", "alien")
        masked = held_out_collage_loss(composition, pipe, base, pool, draws=2)
    alone = held_out_collage_loss(None, pipe, base, pool, draws=2)
    assert one.shape == (5,) and one.dtype == np.float64
    assert np.allclose(one, again, rtol=1e-5) and np.array_equal(masked, alone)
    assert not np.allclose(one, alone, rtol=1e-4) and not np.allclose(one, on_subjects, rtol=1e-3)


def test_pools_of_different_seeds_differ(base_folders: dict[str, Path]) -> None:
    base, pipe = load(base_folders["sd-v"])
    subjects = [subject(name) for name in NAMES]
    one, again, other = (make_pool(pipe, base, subjects, 10, seed) for seed in (1, 1, 2))
    assert torch.equal(one.latents, again.latents) and one.prompts == again.prompts
    assert not torch.equal(one.latents, other.latents)
    assert one.masks.shape == (10, 2, 8, 8) and one.masks.min() >= 0 and one.masks.max() <= 1


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"objective": "magic"}, "objective is one of collage, clip, both"),
        ({"clip_side": 64}, "clip_side is a setting of the objective clip or both"),
        ({"objective": "clip", "clip_weight": 2.0}, "clip_weight is a setting of the objective both"),
        ({"objective": "clip", "subject_weight": 2.0}, "subject_weight is a setting of the objective collage"),
        ({"objective": "clip", "clip_from": 0.7}, "clip_from lies below"),
        ({"objective": "clip", "clip_global": 0.0, "clip_local": 0.0, "clip_direction": 0.0}, "Every term"),
        ({"stop_on": "score", "validate_prompts": 0}, "needs validate_prompts"),
        ({"patience": 2, "validation": 0}, "needs held-out scenes"),
        ({"balance": "even"}, "balance is one of"),
        ({"scope": "pixel"}, "scope is one of"),
        ({"alpha": -1.0}, "alpha is between"),
        ({"lr": 0.0}, "lr is between"),
        ({"granularity": "block"}, "Unknown setting"),
        ({"method": "static", "scope": "token"}, "Static weights have no scope"),
        ({"experts": [{"sha256": "0", "name": "a", "path": "x"}]}, "Unknown setting 'path'"),
    ],
)
def test_bad_settings(options: dict, words: str) -> None:
    with pytest.raises(InvalidRequest, match=words):
        config(**options)


def test_fixed_weights_cannot_be_trained(base_folders: dict[str, Path], tmp_path: Path) -> None:
    base, pipe = load(base_folders["sd-v"])
    with (
        compose(pipe, experts(tmp_path, pipe), gate=StaticWeights((0.5, 0.5)), base=base) as composition,
        pytest.raises(InvalidRequest, match="nothing to train"),
    ):
        GateTask(config(), base, pipe, composition, [subject(name) for name in NAMES])


@pytest.mark.parametrize("weight", [1.0, 3.0])
def test_two_processes_share_a_batch(base_folders: dict[str, Path], tmp_path: Path, weight: float) -> None:
    """Without L_balance, which is no sum over rows, the mean of their gradients is that of one process."""
    unseen = {"validation": 0, "validate_prompts": 0, "stop_on": None}
    settings = config(scope="token", lr=1e-2, alpha=0.0, batch=4, subject_weight=weight, **unseen)
    tasks = [make(base_folders["sd-v"], tmp_path, settings) for _ in range(3)]
    for index, task in enumerate(tasks[1:]):
        task.ranks = Ranks()
        task.ranks.count, task.ranks.index = 2, index
        task.rows = task.ranks.part(4)
    losses = [task.step(0)["loss"] for task in tasks]
    assert losses[0] == pytest.approx((losses[1] + losses[2]) / 2, rel=1e-5)
    for whole, one, two in zip(*(task.parameters for task in tasks), strict=True):
        parts = [torch.zeros_like(whole) if p.grad is None else p.grad for p in (whole, one, two)]
        assert torch.allclose(parts[0], (parts[1] + parts[2]) / 2, rtol=1e-3, atol=1e-6)
