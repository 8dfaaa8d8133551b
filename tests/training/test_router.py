"""The router task on tiny bases: learning, resuming, what each row may use, its file, its command and its job."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mole_diffusion import Expert, compose
from mole_diffusion.errors import InvalidRequest
from mole_diffusion.gates.router_file import load_router, read_router_header
from tests.tiny import cut_out
from tests.training.helpers import load, lora, same
from training.__main__ import main
from training.config import parse
from training.control import Commands
from training.data.subjects import Subject
from training.events import SinkGroup
from training.jobs.kinds import BUILDERS
from training.loop import run
from training.ranks import Ranks
from training.tasks.router import RouterTask
from training.tasks.router_config import RouterTrainingConfig
from training.tasks.router_scenes import draw_groups, draw_present

COLOURS = {"robot": "#d02020", "alien": "#20a020", "cat": "#2020d0", "dog": "#d0d020"}
SMALL: dict[str, Any] = {
    "group": 2, "held_out": 0.5, "pool": 14, "validation": 2, "validate_every": 2, "steps": 3, "batch": 2, "rank": 3,
    "lr": 0.05, "distractors": 1, "self_views": 2,
}  # fmt: skip


def config(**options: Any) -> RouterTrainingConfig:
    return parse(RouterTrainingConfig, {"base": "tiny", **SMALL, **options})


def subjects() -> list[Subject]:
    return [Subject(name, f"zwx {name}", (cut_out(colour),)) for name, colour in COLOURS.items()]


def make_task(folder: Path, base_folder: Path, **options: Any) -> RouterTask:
    base, pipe = load(base_folder)
    experts = [Expert.load(lora(folder, pipe, name, seed=seed, rank=1 + seed % 2)) for seed, name in enumerate(COLOURS)]
    return RouterTask(config(**options), base, pipe, experts, subjects())


def test_trains_and_writes_a_router_for_any_experts(base_folders: dict[str, Path], tmp_path: Path) -> None:
    task = make_task(tmp_path, base_folders["sd-v"])
    assert len(task.groups) == 2 and [len(group.scenes) for group in task.groups] == [12, 2]
    assert not {n for group in task.groups for n in group.experts} & set(task.held) and len(task.held) == 2
    assert sorted(task.pairs[0].experts) == sorted(task.held) and task.pairs[0].named.all()
    metrics = [task.step(index) for index in range(3)]
    assert task.best is not None and task.start is not None
    losses = [task.start["nla_loss"], metrics[1]["held_out_loss"], metrics[2]["held_out_loss"]]
    assert (
        task.best.loss == pytest.approx(min(losses), rel=1e-6) and task.best.step == (0, 2, 3)[int(np.argmin(losses))]
    )
    assert task.start["spans_loss"] != task.start["nla_loss"]
    result = task.finish(tmp_path / "router.safetensors")
    assert result["experts"] == 4 and result["held_out_loss"] == task.best.loss
    task.composition.detach()
    router = load_router(tmp_path / "router.safetensors", task.base)
    assert same(router.tensors, task.best.weights)
    recipe = read_router_header(tmp_path / "router.safetensors").recipe
    assert recipe["experts"] == 4 and recipe["lr"] == 0.05 and recipe["nla_loss"] == task.start["nla_loss"]
    fifth = Expert.load(lora(tmp_path / "new", task.pipe, "bird", seed=9, rank=3))
    with compose(task.pipe, [task.experts[0], fifth], gate=router, base=task.base) as composition:
        assert same(dict(composition.state_dict()), router.tensors)


def test_sdxl_trains_with_experts_in_its_text_encoders(base_folders: dict[str, Path], tmp_path: Path) -> None:
    base, pipe = load(base_folders["sdxl"])
    towers = {"components": ("unet", "text_encoder"), "targets": ("to_q", "to_v", "q_proj")}
    experts = [Expert.load(lora(tmp_path, pipe, name, seed=n, **towers)) for n, name in enumerate(COLOURS)]
    task = RouterTask(config(validation=0, group=3, pool=4), base, pipe, experts, subjects())
    before = task.router.state_dict()["routers." + next(iter(task.router.routers)) + ".b"].clone()
    assert not before.any() and not any("q_proj" in path for path in task.router.routers)
    found = [task.step(index) for index in range(2)]
    assert all(np.isfinite(metrics["loss"]) for metrics in found) and task.best is None
    assert all(float(router.b.detach().abs().max()) > 0 for router in task.router.routers.values())  # type: ignore[union-attr]


def test_resumed_equals_uninterrupted_bit_for_bit(base_folders: dict[str, Path], tmp_path: Path) -> None:
    whole = make_task(tmp_path, base_folders["sd-v"])
    expected = [whole.step(index) for index in range(3)]
    first = make_task(tmp_path, base_folders["sd-v"])
    first.step(0)
    first.step(1)
    second = make_task(tmp_path, base_folders["sd-v"])
    second.load_state_dict(first.state_dict())
    assert second.step(2) == expected[2]
    assert same(second.router.state_dict(), whole.router.state_dict())
    assert second.best is not None and whole.best is not None and same(second.best.weights, whole.best.weights)
    other = make_task(tmp_path, base_folders["sd-v"], steps=4)
    with pytest.raises(InvalidRequest, match="other settings"):
        other.load_state_dict(first.state_dict())


def test_absent_experts_get_exactly_nothing(base_folders: dict[str, Path], tmp_path: Path) -> None:
    task = make_task(tmp_path, base_folders["sd-v"], validation=0, group=4, dropout=1.0, batch=4)
    with torch.no_grad():
        for parameter in task.parameters:
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    weights: list[torch.Tensor] = []
    forward = task.pipe.unet.register_forward_hook(
        lambda *_: weights.extend(r.probabilities.detach() for r in task.composition._context.records.values())
    )
    metrics = task.step(0)
    forward.remove()
    shares = [weight.mean(1) for weight in weights]  # (rows, experts)
    there = shares[0] > 0
    assert metrics["present"] == there.sum(1).float().mean() < 4
    assert all(torch.equal(share > 0, there) for share in shares)


def test_two_processes_average_to_one(base_folders: dict[str, Path], tmp_path: Path) -> None:
    """Each takes its half of the rows; the mean of their gradients is the whole batch's."""

    class Half(Ranks):
        def __init__(self, index: int) -> None:
            super().__init__()
            self.count, self.index = 2, index

    gradients = []
    for ranks in (Ranks(), Half(0), Half(1)):
        base, pipe = load(base_folders["sd-v"])
        experts = [Expert.load(lora(tmp_path, pipe, name, seed=n)) for n, name in enumerate(COLOURS)]
        task = RouterTask(config(subject_weight=3.0, batch=4, validation=0), base, pipe, experts, subjects(), ranks)
        task._train(torch.Generator().manual_seed(3))
        gradients.append([torch.zeros_like(p) if p.grad is None else p.grad for p in task.parameters])
    for whole, one, two in zip(*gradients, strict=True):
        torch.testing.assert_close((one + two) / 2, whole, rtol=1e-4, atol=1e-7)


def test_expert_dropout() -> None:
    named = torch.tensor([[True, False, False, False], [True, True, False, False]]).repeat(500, 1)
    present = draw_present(named, 0.5, 2, torch.Generator().manual_seed(0))
    others = (present & ~named).sum(1)
    assert bool((present | ~named).all()) and int(others.max()) == 2
    assert abs(float(others[1::2].float().mean()) - 1.0) < 0.1  # two others, half of them dropped
    assert torch.equal(draw_present(named, 1.0, 2, torch.Generator()), named)
    assert torch.equal(draw_present(named, 0.0, 0, torch.Generator()), named)
    assert bool(draw_present(named, 0.0, 3, torch.Generator()).all())


def test_groups_use_every_expert_before_any_comes_again() -> None:
    groups = draw_groups(range(3, 10), 7, 3, seed=1)
    assert len(groups) == 7 and all(len(set(group)) == 3 for group in groups)
    assert {n for group in groups[:3] for n in group} == set(range(3, 10))
    assert groups == draw_groups(range(3, 10), 7, 3, seed=1) != draw_groups(range(3, 10), 7, 3, seed=2)


@pytest.mark.parametrize(
    ("options", "count", "words"),
    [
        ({"held_out": 0.2}, 4, "leaves 1 for the validation"),
        ({"group": 4}, 4, "only 2 of 4 are trained on"),
        ({"validation": 0, "group": 5}, 4, "only 4 of 4"),
    ],
)
def test_too_few_experts(options: dict[str, Any], count: int, words: str) -> None:
    with pytest.raises(InvalidRequest, match=words):
        config(**options).split(count)


def test_bad_settings() -> None:
    for options, words in (({"dropout": 2.0}, "dropout is between"), ({"group": 1}, "group is between")):
        with pytest.raises(InvalidRequest, match=words):
            config(**options)


def test_command_and_job(base_folders: dict[str, Path], tmp_path: Path, capsys: Any) -> None:
    _, pipe = load(base_folders["sd-v"])
    pool, views = tmp_path / "pool", tmp_path / "views"
    for seed, (name, colour) in enumerate(COLOURS.items()):
        lora(pool, pipe, name, seed=seed)
        if name != "dog":  # it makes its own
            (views / name).mkdir(parents=True)
            cut_out(colour).save(views / name / "0.png")
    options = [f"--{key.replace('_', '-')}={value}" for key, value in SMALL.items()]
    common = ["router", "--base", str(base_folders["sd-v"]), "--out", str(tmp_path / "r.safetensors"), "--json"]
    assert main([*common, *options, "--experts", str(pool), "--views-root", str(views), "--device", "cpu"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["step"] == 3 and load_router(found["path"]).rank == 3
    assert main([*common, "--experts", str(tmp_path / "nowhere")]) == 2
    assert "is not a folder" in capsys.readouterr().err

    data, entries = tmp_path / "data", []
    shutil.copytree(views, data / "subjects")
    for name in COLOURS:
        sha256 = hashlib.sha256((pool / f"{name}.safetensors").read_bytes()).hexdigest()
        (data / "experts").mkdir(exist_ok=True, parents=True)
        shutil.copy(pool / f"{name}.safetensors", data / "experts" / f"{sha256}.safetensors")
        own = {} if name == "dog" else {"views": f"subjects/{name}"}
        entries.append({"sha256": sha256, "name": name, "class": name, **own})
    entries.sort(key=lambda entry: entry["name"])  # as the command finds them
    settings = {"base": str(base_folders["sd-v"]), **SMALL, "experts": entries}
    task, out = BUILDERS["router"](settings, data, data / "jobs" / "abc", lambda text: None)
    assert out == data / "routers" / "abc.safetensors"
    outcome = run(task, SinkGroup(), Commands(), data / "jobs" / "abc" / "checkpoints", out=out)
    assert outcome.status == "finished" and same(load_router(out).tensors, load_router(found["path"]).tensors)
    again = dict(settings, experts=[*entries[:3], {**entries[0], "name": "other"}])
    with pytest.raises(InvalidRequest, match="are both called"):
        BUILDERS["router"](again, data, data / "jobs" / "abd", lambda text: None)
