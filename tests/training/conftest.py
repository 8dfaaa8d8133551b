"""Tiny bases saved once for all training tests."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.training.helpers import MAKERS, save_base


@pytest.fixture(scope="session")
def base_folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders of tiny bases by kind: read them, never write into them."""
    root = tmp_path_factory.mktemp("bases")
    return {kind: save_base(root / kind, kind) for kind in MAKERS}
