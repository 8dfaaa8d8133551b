"""The subject task on tiny bases: exact resume, only the adapter learns, a file that diffusers reads."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from mole_diffusion import Expert
from mole_diffusion.bases import Base
from mole_diffusion.errors import InvalidRequest
from mole_diffusion.experts import check_fits
from tests.training.helpers import load, same, subject, tensors_of
from tests.training.test_loop import StopAfter
from training.build import load_base
from training.config import parse
from training.control import Commands
from training.data.subjects import Subject
from training.data.views import class_pool
from training.errors import TrainingFailed, memory_named
from training.events import MemorySink, Progress, Sample
from training.loop import Schedule, run
from training.objectives.denoise import min_snr_weights
from training.optimisers import make_optimiser, rate_factor
from training.presets import advice
from training.rng import step_generator
from training.tasks.subject import SubjectConfig, SubjectTask
from training.tasks.subject_adapter import target_paths


def config(base: Path, **options: object) -> SubjectConfig:
    settings = {"token": "zwx", "class": "robot", "steps": 6, "batch": 2, "pool": 8, "rank": 2, **options}
    return parse(SubjectConfig, {"base": str(base), **settings})


def make(settings: SubjectConfig) -> SubjectTask:
    base, pipe = load(Path(settings.base))
    return SubjectTask(settings, base, pipe, subject("robot"))


def train(task: SubjectTask, folder: Path, control: Commands | None = None, **options: object):
    sink = MemorySink()
    outcome = run(task, sink, control or Commands(), folder / "c", out=folder / "robot.safetensors", **options)
    return outcome, sink


LORA, MOSLORA = {"adapter": "lora"}, {"adapter": "moslora", "rank": 4}


@pytest.mark.parametrize("options", [LORA, MOSLORA, {**MOSLORA, "train_text_encoders": True}], ids=str)
@pytest.mark.parametrize("kind", ["sd-v", "sdxl", pytest.param("sd-epsilon", marks=pytest.mark.long)])
def test_file_does_in_diffusers_what_was_trained(
    base_folders: dict[str, Path], kind: str, options: dict, tmp_path: Path
) -> None:
    task = make(config(base_folders[kind], steps=2, lr=1e-2, **options))
    before = tensors_of(load(base_folders[kind])[1])
    outcome, sink = train(task, tmp_path)
    assert outcome.status == "finished" and len(sink.of(Progress)) == 2
    expert = Expert.load(tmp_path / "robot.safetensors")
    check_fits(expert, task.base)
    assert (expert.trigger, expert.base, expert.metadata["mole.class"]) == ("zwx robot", task.base.family, "robot")
    about = [expert.metadata.get(f"mole.{name}") for name in ("adapter", "mixer", "rank", "steps", "seed")]
    mixer = "orthogonal" if task.config.adapter == "moslora" else None
    assert about == [task.config.adapter, mixer, str(task.config.rank), "2", "0"]
    text = task.config.train_text_encoders
    assert expert.ranks.keys() == {task.config.rank}
    assert expert.components == (task.base.components if text else ("unet",))
    paths = {key.removeprefix("unet.") for key in expert.modules if key.startswith("unet.")}
    assert paths == set(task.base.target_paths("unet"))
    x, (_, fresh) = torch.randn(1, 8, 8, 8), load(base_folders[kind])
    trained, plain = answer(task.base, task.pipe, x), answer(task.base, fresh, x)
    fresh.load_lora_weights(str(tmp_path / "robot.safetensors"))
    assert torch.allclose(trained, answer(task.base, fresh, x), atol=1e-5)
    assert not torch.allclose(trained, plain, atol=1e-3)
    task.close()
    assert same(before, tensors_of(task.pipe))


@torch.no_grad()
def answer(base: Base, pipe: Any, x: torch.Tensor) -> torch.Tensor:
    """What the whole pipeline says of noisy latents: text encoders and UNet."""
    pipe.unet.eval()
    conditioning = base.encode(pipe, ["a zwx robot"], size=(64, 64))
    return pipe.unet(x, 500, **base.unet_kwargs(conditioning)).sample


RICH = {
    **MOSLORA, "train_text_encoders": True, "schedule": "cosine", "warmup": 2, "accumulate": 2, "prior_pictures": 1,
}  # fmt: skip


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({"prior_pictures": 1, "snr_gamma": 5.0}, id="plain", marks=pytest.mark.long),
        pytest.param(RICH, id="rich", marks=pytest.mark.long),
        pytest.param({"optimiser": "adamw8bit", "rank": 64}, id="8 bits"),
    ],
)
def test_resumed_equals_uninterrupted(base_folders: dict[str, Path], tmp_path: Path, options: dict) -> None:
    settings = config(base_folders["sd-v"], **{"steps": 5, **options})
    whole = make(settings)
    train(whole, tmp_path / "whole")
    train(make(settings), tmp_path / "parts", StopAfter(3))
    resumed = make(settings)
    outcome, sink = train(resumed, tmp_path / "parts")
    assert outcome.status == "finished" and sink.of(Progress)[0].step == 4
    assert same(whole.parameters, resumed.parameters)  # type: ignore[arg-type]
    assert ("prior_loss" in sink.of(Progress)[0].metrics) == bool(settings.prior_pictures)


def test_8_bits_are_8_bits(base_folders: dict[str, Path]) -> None:
    task = make(config(base_folders["sd-v"], optimiser="adamw8bit", rank=64))
    task.step(0)
    moments = [state["state1"].dtype for state in task.optimiser.state.values()]
    assert torch.uint8 in moments and torch.float32 in moments  # small tensors keep 32
    with pytest.raises(InvalidRequest, match="not on mps: choose adamw"):
        make_optimiser("adamw8bit", [], torch.device("mps"))


def test_accumulated_batches_make_the_mean_gradient(base_folders: dict[str, Path]) -> None:
    settings = config(base_folders["sd-epsilon"], accumulate=2, lr=1e-2)
    task, other = make(settings), make(settings)
    generator = step_generator(0, 1, 0)
    losses = [other._loss(other.pool, generator) for _ in range(2)]
    (sum(losses) / 2).backward()  # type: ignore[union-attr]
    torch.nn.utils.clip_grad_norm_(list(other.parameters.values()), 1.0)
    assert task.step(0)["loss"] == pytest.approx(sum(loss.item() for loss in losses) / 2)
    for name, parameter in task.parameters.items():
        assert torch.allclose(parameter.grad, other.parameters[name].grad, atol=1e-6)  # type: ignore[arg-type]


def test_targets(base_folders: dict[str, Path]) -> None:
    base, _ = load(base_folders["sdxl"])
    attention = target_paths(base, config(base_folders["sdxl"], targets="attention"), "unet")
    everything = target_paths(base, config(base_folders["sdxl"], targets="all"), "unet")
    assert {path.rsplit("attn", 1)[1][2:] for path in attention} == {"to_q", "to_k", "to_v", "to_out.0"}
    tails = {path.rsplit(".", 1)[1] for path in set(everything) - set(attention)}
    assert set(attention) < set(everything) and tails == {"proj", "2", "conv1", "conv2"}


def test_rates() -> None:
    assert [rate_factor("constant", index, 10, 0) for index in (0, 9)] == [1.0, 1.0]
    assert [rate_factor("constant", index, 10, 3) for index in range(4)] == [0.25, 0.5, 0.75, 1.0]
    cosine = [rate_factor("cosine", index, 10, 2) for index in range(10)]
    assert cosine[2] == 1.0 and cosine[6] == pytest.approx(0.5) and cosine[2:] == sorted(cosine[2:], reverse=True)


def test_idle_parts_that_wait_elsewhere_change_nothing(base_folders: dict[str, Path]) -> None:
    here, away = (make(config(base_folders["sd-v"], offload=offload)) for offload in (False, True))
    assert here.step(0) == away.step(0)


def test_checkpointing_changes_nothing_but_memory(base_folders: dict[str, Path]) -> None:
    losses = []
    for asked in (False, True):
        base, pipe = load_base(str(base_folders["sd-v"]), None, asked)
        assert pipe.unet.is_gradient_checkpointing == asked
        task = SubjectTask(config(base_folders["sd-v"], lr=1e-2), base, pipe, subject("robot"))
        losses.append([task.step(index)["loss"] for index in range(2)])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_class_pictures_are_made_once(base_folders: dict[str, Path], tmp_path: Path) -> None:
    base, pipe = load(base_folders["sd-v"])
    options = {"together": 2, "folder": tmp_path}
    first = class_pool(pipe, base, "robot", 64, 3, 5, **options)
    files = sorted(tmp_path.rglob("*.png"))
    assert [path.name for path in files] == ["5.png", "6.png", "7.png"]
    assert first.captions[0] == first.captions[1] != first.captions[2]
    stamps, kept = [path.stat().st_mtime_ns for path in files], files[0].read_bytes()
    assert torch.equal(class_pool(pipe, base, "robot", 64, 3, 5, **options).latents, first.latents)
    assert [path.stat().st_mtime_ns for path in files] == stamps
    files[0].unlink()  # killed in between
    assert torch.equal(class_pool(pipe, base, "robot", 64, 3, 5, **options).latents, first.latents)
    assert files[0].read_bytes() == kept


def test_used_up_memory_is_a_sentence(base_folders: dict[str, Path]) -> None:
    task = make(config(base_folders["sd-v"]))
    task.batch = 2**50
    with pytest.raises(TrainingFailed, match=r"at 64 pixels does not fit .* or the preset 8gb"):
        task.step(0)
    with pytest.raises(TrainingFailed, match="too large"), memory_named("too large"):
        raise MemoryError
    with pytest.raises(RuntimeError, match="another"), memory_named("too large"):
        raise RuntimeError("another")
    assert advice(4, 1024, 79.2).endswith("preset 24gb.") and advice(1, 1024, 23.6).endswith("preset 8gb.")


def test_checkpoint_of_other_settings_is_refused(base_folders: dict[str, Path], tmp_path: Path) -> None:
    settings = config(base_folders["sd-v"])
    train(make(settings), tmp_path, StopAfter(2))
    with pytest.raises(InvalidRequest, match="other settings"):
        train(make(replace(settings, lr=0.5)), tmp_path)


def test_learns_its_pictures(base_folders: dict[str, Path]) -> None:
    task = make(config(base_folders["sd-v"], steps=80, batch=2, pool=2, rank=8, lr=1e-2))
    losses = [task.step(index)["loss"] for index in range(80)]
    assert sum(losses[-10:]) < 0.9 * sum(losses[:10])


def test_sample_is_a_picture_with_parameters(base_folders: dict[str, Path], tmp_path: Path) -> None:
    from mole_diffusion.png import read_parameters

    task = make(config(base_folders["sd-v"], steps=1))
    _, sink = train(task, tmp_path, schedule=Schedule(sample_every=1))
    first, _, _, last = sink.of(Sample)
    assert read_parameters(first.path)["prompt"] == "a zwx robot on a blue background" == first.prompt
    assert last.prompt == "a zwx robot on a beach" and last.step == 1
    assert read_parameters(last.path)["seed"] == read_parameters(first.path)["seed"]
    assert last.identity.keys() == {"robot"}


def test_bfloat16_steps_keep_float32_weights(base_folders: dict[str, Path]) -> None:
    task = make(config(base_folders["sd-v"], precision="bfloat16"))
    assert torch.isfinite(torch.tensor(task.step(0)["loss"]))
    assert {parameter.dtype for parameter in task.parameters.values()} == {torch.float32}


def test_min_snr_weights(base_folders: dict[str, Path]) -> None:
    t = torch.tensor([0, 500, 999])
    for kind, shift in (("sd-epsilon", 0.0), ("sd-v", 1.0)):
        base, pipe = load(base_folders[kind])
        alpha = pipe.scheduler.alphas_cumprod[t]
        snr = (alpha / (1 - alpha)).clamp(min=1e-8)
        expected = snr.clamp(max=5.0) / (snr + shift)
        assert torch.allclose(min_snr_weights(pipe, base, t, 5.0), expected)
        assert torch.isfinite(expected).all()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"rank": 0}, "rank is between"),
        ({"token": " "}, "needs a token"),
        ({"token": "x" * 65}, "64 characters"),
        ({"lr": 3.0}, "lr is between"),
        ({"adapter": "dora"}, "adapter is one of"),
        ({"mixer": "orthogonal"}, "Only the adapter moslora"),
        ({"adapter": "moslora", "mixer": "zero"}, "mixer is one of"),
        ({"adapter": "moslora", "mixer": "butterfly", "rank": 3}, "rank is even"),
        ({"text_lr": 1e-3}, "set train_text_encoders"),
        ({"warmup": 7}, "warmup is at most"),
        ({"colour": "red"}, "Unknown setting"),
        ({"steps": "many"}, "steps is a int"),
    ],
)
def test_bad_settings(options: dict, words: str) -> None:
    with pytest.raises(InvalidRequest, match=words):
        config(Path("demo"), **options)


def test_subject_without_pictures_and_odd_size(base_folders: dict[str, Path]) -> None:
    base, pipe = load(base_folders["sd-v"])
    with pytest.raises(InvalidRequest, match="no picture"):
        SubjectTask(config(base_folders["sd-v"]), base, pipe, Subject("robot", "zwx robot", ()))
    with pytest.raises(InvalidRequest, match="multiples"):
        SubjectTask(config(base_folders["sd-v"], resolution=60), base, pipe, subject("robot"))
