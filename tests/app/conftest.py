"""Services on a fresh data folder and the tiny assets; a page that really serves."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from app.plan import Order, Subject
from app.services import Services, build_services
from app.settings import Settings
from tests.tiny import tiny_lora, tiny_sd


@pytest.fixture
def settings(tmp_path: Path, demo_assets: Path) -> Settings:
    return Settings(data_dir=tmp_path / "data", port=0, device="cpu", warm_up=False)


@pytest.fixture
def services(settings: Settings) -> Services:
    return build_services(settings)


@dataclass(frozen=True)
class Files:
    """Files as users have them: two good LoRAs, and bad ones with a word of the sentence each must get."""

    robot: Path
    bunny: Path
    bad: dict[Path, str]


@pytest.fixture(scope="session")
def files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    folder = tmp_path_factory.mktemp("files")
    pipe = tiny_sd()
    robot = tiny_lora(folder / "tin_robot.safetensors", pipe, seed=11, metadata=said("qvx robot"))
    bunny = tiny_lora(folder / "snow-bunny.safetensors", pipe, seed=12, rank=4, metadata=said("pqr bunny"))
    pickle = folder / "model.ckpt"
    pickle.write_bytes(b"\x80\x04\x95" + b"0" * 200)
    half = folder / "half.safetensors"
    half.write_bytes(robot.read_bytes()[:3000])
    text = folder / "notes.safetensors"
    text.write_text("this is not a LoRA at all, only words")
    other = tiny_lora(folder / "other_base.safetensors", tiny_sd_wide(), seed=3, metadata={"format": "pt"})
    return Files(robot, bunny, {pickle: "pickle", half: "cut off", text: "safetensors", other: "fits"})


def said(trigger: str) -> dict[str, str]:
    return {"mole.base": "demo", "modelspec.trigger_phrase": trigger}


def tiny_sd_wide() -> object:
    """A pipeline of another shape: its LoRAs fit no base of the page."""
    import torch

    pipe = tiny_sd()
    for name, module in pipe.unet.named_modules():
        if name.endswith("to_q"):
            parent = pipe.unet.get_submodule(name.rpartition(".")[0])
            parent.to_q = torch.nn.Linear(module.in_features + 3, module.out_features)
    return pipe


@pytest.fixture
def order(services: Services) -> Order:
    """The demo's two subjects, four steps."""
    subjects = tuple(Subject.of(entry) for entry in services.library.entries())
    return Order(base="demo", subjects=subjects, method="nla", prompt="a zwx bunny and a zwx robot", steps=4, seed=7)


@pytest.fixture
def trained(services: Services, order: Order, tmp_path: Path) -> Iterator[Order]:
    """The same order with gates that were saved as a composition."""
    from mole_diffusion import Expert, GateConfig, compose
    from mole_diffusion.bases import get_base

    base = get_base("demo")
    experts = [Expert.load(s.path, name=s.name, trigger=s.trigger) for s in order.subjects]
    composition = compose(tiny_sd(), experts, gate=GateConfig(scope="token"), base=base)
    path = composition.save(tmp_path / "gates.safetensors")
    yield replace(order, method="gates", composition=path)
