"""One tiny model of each kind, and two experts of different ranks and targets as folders of PEFT."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from mole_diffusion import Expert
from tests.text.small import MAKERS, saved_expert


@pytest.fixture(scope="session", params=MAKERS)
def kind(request: Any) -> str:
    return request.param


@pytest.fixture(scope="session")
def model(kind: str) -> Any:
    return MAKERS[kind]()


@pytest.fixture(scope="session")
def folder(kind: str, tmp_path_factory: Any) -> Path:
    path = tmp_path_factory.mktemp(kind)
    saved_expert(kind, path, "wide", 0)
    saved_expert(kind, path, "few", 1, few=True, rank=3)
    return path


@pytest.fixture(scope="session")
def experts(folder: Path) -> list[Expert]:
    return [Expert.load(folder / name) for name in ("wide", "few")]
