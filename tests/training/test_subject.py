"""The subject task on tiny bases: exact resume, only the adapter learns, a file that diffusers reads."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from mole_diffusion import Expert
from mole_diffusion.errors import InvalidRequest
from mole_diffusion.experts import check_fits
from tests.training.helpers import MAKERS, load, same, subject, tensors_of
from tests.training.test_loop import StopAfter
from training.config import parse
from training.control import Commands
from training.data.subjects import Subject
from training.events import MemorySink, Progress, Sample
from training.loop import Schedule, run
from training.objectives.denoise import min_snr_weights
from training.tasks.subject import SubjectConfig, SubjectTask


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


@pytest.mark.parametrize("kind", MAKERS)
def test_trains_an_expert_that_fits_and_loads(base_folders: dict[str, Path], kind: str, tmp_path: Path) -> None:
    task = make(config(base_folders[kind], steps=3, lr=1e-2))
    outcome, sink = train(task, tmp_path)
    assert outcome.status == "finished" and len(sink.of(Progress)) == 3
    expert = Expert.load(tmp_path / "robot.safetensors")
    check_fits(expert, task.base)
    assert (expert.trigger, expert.base, expert.metadata["mole.class"]) == ("zwx robot", task.base.family, "robot")
    assert expert.ranks.keys() == {2} and expert.components == ("unet",)
    assert {key.removeprefix("unet.") for key in expert.modules} == set(task.base.target_paths("unet"))
    assert any(pair.delta().abs().max() > 0 for pair in expert.modules.values())


def test_file_gives_the_same_unet_in_diffusers(base_folders: dict[str, Path], tmp_path: Path) -> None:
    task = make(config(base_folders["sd-v"], lr=1e-2))
    train(task, tmp_path)
    task.pipe.unet.eval()
    x, text = torch.randn(1, 8, 8, 8), torch.randn(1, 32, 32)
    with torch.no_grad():
        trained = task.pipe.unet(x, 500, encoder_hidden_states=text).sample
        _, fresh = load(base_folders["sd-v"])
        plain = fresh.unet(x, 500, encoder_hidden_states=text).sample
        fresh.load_lora_weights(str(tmp_path / "robot.safetensors"))
        loaded = fresh.unet(x, 500, encoder_hidden_states=text).sample
    assert torch.allclose(trained, loaded, atol=1e-5) and not torch.allclose(trained, plain, atol=1e-3)


def test_resumed_equals_uninterrupted(base_folders: dict[str, Path], tmp_path: Path) -> None:
    settings = config(base_folders["sd-v"], snr_gamma=5.0, prior_pictures=1, steps=5)
    whole = make(settings)
    train(whole, tmp_path / "whole")
    train(make(settings), tmp_path / "parts", StopAfter(3))
    resumed = make(settings)
    outcome, sink = train(resumed, tmp_path / "parts", schedule=Schedule(sample_every=5))
    assert outcome.status == "finished" and sink.of(Progress)[0].step == 4
    assert same(whole.parameters, resumed.parameters)  # type: ignore[arg-type]
    assert "prior_loss" in sink.of(Progress)[0].metrics


def test_checkpoint_of_other_settings_is_refused(base_folders: dict[str, Path], tmp_path: Path) -> None:
    settings = config(base_folders["sd-v"])
    train(make(settings), tmp_path, StopAfter(2))
    with pytest.raises(InvalidRequest, match="other settings"):
        train(make(replace(settings, lr=0.5)), tmp_path)


def test_base_is_unchanged_after_close(base_folders: dict[str, Path], tmp_path: Path) -> None:
    base, pipe = load(base_folders["sd-epsilon"])
    before = tensors_of(pipe)
    task = SubjectTask(config(base_folders["sd-epsilon"]), base, pipe, subject("robot"))
    train(task, tmp_path)
    task.close()
    assert same(before, tensors_of(pipe))


def test_learns_its_pictures(base_folders: dict[str, Path]) -> None:
    task = make(config(base_folders["sd-v"], steps=80, batch=2, pool=2, rank=8, lr=1e-2))
    losses = [task.step(index)["loss"] for index in range(80)]
    assert sum(losses[-10:]) < 0.9 * sum(losses[:10])


def test_sample_is_a_picture_with_parameters(base_folders: dict[str, Path], tmp_path: Path) -> None:
    from mole_diffusion.png import read_parameters

    task = make(config(base_folders["sd-v"], steps=1))
    _, sink = train(task, tmp_path, schedule=Schedule(sample_every=1))
    first, last = sink.of(Sample)
    assert read_parameters(first.path)["prompt"] == "a zwx robot on a blue background" == last.prompt


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
