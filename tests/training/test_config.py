"""Configurations: every wrong value is one sentence."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import pytest

from mole_diffusion.errors import InvalidRequest
from training.config import parse


@dataclass(frozen=True)
class Inner:
    a: int = 1


@dataclass(frozen=True)
class Settings:
    name: str
    rate: float = 0.1
    mode: Literal["x", "y"] = "x"
    limit: int | None = None
    items: tuple[Inner, ...] = ()


def test_parse_accepts_json_values() -> None:
    values = {"name": "n", "rate": 1, "mode": "y", "limit": 3, "items": [{"a": 2}]}
    assert parse(Settings, values) == Settings("n", 1.0, "y", 3, (Inner(2),))
    assert parse(Settings, {"name": "n", "limit": None}).limit is None


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"name": "n", "nam": 1}, "Unknown setting 'nam'"),
        ({}, "missing"),
        ({"name": 1}, "name is a str"),
        ({"name": "n", "rate": "fast"}, "rate is a float"),
        ({"name": "n", "mode": "z"}, "mode is one of x, y"),
        ({"name": "n", "limit": True}, "limit is a int"),
        ({"name": "n", "items": [{"b": 1}]}, "Unknown setting 'b'"),
        ({"name": "n", "items": 3}, "items is a list"),
    ],
)
def test_parse_refuses(values: dict, words: str) -> None:
    with pytest.raises(InvalidRequest, match=words):
        parse(Settings, values)
