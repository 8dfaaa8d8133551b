"""Gates that start from those of a subset, and gates trained before: exact where nothing new takes part."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mole_diffusion import Composition, Expert, GateConfig, compose, load_composition
from mole_diffusion.bases import Base
from mole_diffusion.composition import learned_static
from mole_diffusion.errors import InvalidRequest
from tests.training.helpers import load, lora
from training.build import GateExpert
from training.gate_cache import cached_composition, composition_key, store_composition
from training.tasks.gate import GateTrainingConfig
from training.warm_start import warm_start

PROMPT = "a zwx robot and a zwx alien"


class World:
    """A base and three experts."""

    def __init__(self, base: Base, pipe: Any, folder: Path) -> None:
        self.base, self.pipe = base, pipe
        names = ("robot", "alien", "bunny")
        self.experts = {
            name: Expert.load(lora(folder, pipe, name, seed=seed, targets=("to_q", "to_k", "to_v", "conv1")))
            for seed, name in enumerate(names, 1)
        }

    def compose(self, *names: str, gate: Any) -> Composition:
        return compose(self.pipe, [self.experts[name] for name in names], gate=gate, base=self.base)

    def answer(self, composition: Composition) -> Tensor:
        with composition, torch.no_grad():
            conditioning = self.base.encode(self.pipe, [PROMPT])
            composition.condition([PROMPT], guidance=False)
            latents = torch.randn(1, 8, 8, 8, generator=torch.Generator().manual_seed(1))
            kwargs = self.base.unet_kwargs(conditioning)
            return self.pipe.unet(latents, torch.tensor([400]), **kwargs, return_dict=False)[0]


@pytest.fixture(scope="module")
def world(base_folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(*load(base_folders["sd-v"]), tmp_path_factory.mktemp("experts"))


def trained(world: World, path: Path, gate: Any, *names: str) -> Composition:
    """Gates with random weights, as after a training; saved to ``path``."""
    composition = world.compose(*names, gate=gate)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in composition.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    composition.save(path)
    return composition


@pytest.mark.parametrize(
    "gate",
    [
        GateConfig(),
        GateConfig(scope="token", scale="null", gain=True),
        GateConfig(scope="token", scale="sigmoid"),
        learned_static(2),
    ],
    ids=["sample", "null", "sigmoid", "static"],
)
def test_new_expert_masked_gives_the_old_gates(world: World, gate: Any, tmp_path: Path) -> None:
    old = trained(world, tmp_path / "two.safetensors", gate, "robot", "alien")
    three = gate if isinstance(gate, GateConfig) else learned_static(3)
    new = world.compose("alien", "bunny", "robot", gate=three)
    assert warm_start(new, tmp_path / "two.safetensors") == ("alien", "robot")
    together = world.answer(new)
    new.mask("bunny")
    expected = world.answer(old)
    assert torch.allclose(world.answer(new), expected, atol=2e-5)
    assert not torch.allclose(together, expected, atol=1e-3)


def test_new_expert_starts_as_the_mean_of_the_known(world: World, tmp_path: Path) -> None:
    old = trained(world, tmp_path / "two.safetensors", GateConfig(), "robot", "alien").state_dict()
    new = world.compose("bunny", "robot", "alien", gate=GateConfig())
    warm_start(new, tmp_path / "two.safetensors")
    rows = {key: value for key, value in new.state_dict().items() if ".up." in key}
    assert rows
    for key, value in rows.items():
        assert torch.equal(value[1:], old[key]) and torch.equal(value[0], old[key].mean(0)), key


def test_what_does_not_fit_is_refused_with_a_reason(world: World, tmp_path: Path) -> None:
    path = tmp_path / "two.safetensors"
    trained(world, path, GateConfig(), "robot", "alien")
    for gate, names, words in (
        (GateConfig(scope="token"), ("robot", "bunny"), "scope 'sample', these have 'token'"),
        (learned_static(2), ("robot", "bunny"), "another kind"),
        (GateConfig(input="energy"), ("robot", "bunny"), "look at hidden states"),
    ):
        with pytest.raises(InvalidRequest, match=words):
            warm_start(world.compose(*names, gate=gate), path)
    with pytest.raises(InvalidRequest, match="none of which"):
        warm_start(world.compose("bunny", gate=GateConfig()), path)


def test_the_same_set_is_trained_once(world: World, tmp_path: Path) -> None:
    gate = GateConfig(scope="token")
    old = trained(world, tmp_path / "two.safetensors", gate, "robot", "alien")
    robot, alien = (GateExpert(world.experts[name], f"zwx {name}") for name in ("robot", "alien"))
    config = GateTrainingConfig("tiny", scope="token")
    key = composition_key(config, world.base, [robot, alien])
    assert cached_composition(key, tmp_path / "cache", [robot, alien], tmp_path / "x.safetensors") is None
    stored = store_composition(tmp_path / "two.safetensors", key, tmp_path / "cache")
    called = GateExpert(replace(robot.expert, name="my robot"), robot.phrase)
    again = composition_key(config, world.base, [alien, called])
    out = cached_composition(again, tmp_path / "cache", [alien, called], tmp_path / "swapped.safetensors")
    assert again == key and out is not None
    loaded = load_composition(out, world.pipe, {e.sha256: e for e in world.experts.values()}, world.base)
    assert loaded.names == ("alien", "my robot")
    assert torch.allclose(world.answer(loaded), world.answer(old), atol=2e-5)
    stored.write_bytes(stored.read_bytes()[:100])
    assert cached_composition(key, tmp_path / "cache", [robot, alien], tmp_path / "x.safetensors") is None


def test_everything_that_decides_changes_the_key(world: World, tmp_path: Path) -> None:
    pair = [GateExpert(world.experts[name], f"zwx {name}") for name in ("robot", "alien")]
    config = GateTrainingConfig("tiny")
    (tmp_path / "views").mkdir()
    (tmp_path / "views" / "0.png").write_bytes(b"one")
    seen = [replace(pair[0], views=tmp_path / "views"), pair[1]]
    keys = [
        composition_key(config, world.base, pair),
        composition_key(replace(config, alpha=0.1), world.base, pair),
        composition_key(config, replace(world.base, prediction_type="epsilon"), pair),
        composition_key(config, world.base, [replace(pair[0], phrase="zwx toy"), pair[1]]),
        composition_key(config, world.base, seen),
        composition_key(config, world.base, pair, warm_start=tmp_path / "views" / "0.png"),
    ]
    (tmp_path / "views" / "0.png").write_bytes(b"two")
    keys.append(composition_key(config, world.base, seen))
    assert len(set(keys)) == len(keys)
