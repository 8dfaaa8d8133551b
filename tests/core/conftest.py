"""Fixtures of the core's tests."""

from __future__ import annotations

from typing import Any

import pytest

from tests.core.small import PIPELINES, make_sd, make_sdxl


@pytest.fixture(params=["sd", "sdxl"])
def pipe(request: pytest.FixtureRequest) -> Any:
    """Both tiny pipelines, fresh for every test."""
    return PIPELINES[request.param]()


@pytest.fixture
def sd() -> Any:
    """The tiny SD 2.1."""
    return make_sd()


@pytest.fixture
def sdxl() -> Any:
    """The tiny SDXL."""
    return make_sdxl()
