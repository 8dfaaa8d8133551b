"""Fixtures shared by all tests: no network, few threads, one tiny assets folder per run."""

from __future__ import annotations

import os
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch

from tests.tiny import tiny_assets

torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", min(2, os.cpu_count() or 1))))


@pytest.fixture(scope="session")
def assets_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny assets folder, built once: read it, never write into it."""
    return tiny_assets(tmp_path_factory.mktemp("assets"))


@pytest.fixture
def demo_assets(assets_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The tiny assets folder, in force through MOLE_ASSETS: ``get_base("demo")`` is the tiny base."""
    monkeypatch.setenv("MOLE_ASSETS", str(assets_folder))
    return assets_folder
