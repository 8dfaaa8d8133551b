"""Reading a configuration: unknown keys, wrong types and values out of range raise one sentence."""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Mapping
from typing import Any, TypeVar

from mole_diffusion.errors import InvalidRequest

Config = TypeVar("Config")


def parse(kind: type[Config], values: Mapping[str, Any]) -> Config:
    """Build the dataclass ``kind`` from JSON values. Raises InvalidRequest.

    A field whose name is no Python name in JSON ("class") has it as ``key`` in its metadata.
    """
    hints = typing.get_type_hints(kind)
    names = {item.metadata.get("key", item.name): item.name for item in dataclasses.fields(kind)}  # type: ignore[arg-type]
    unknown = sorted(set(values) - set(names))
    if unknown:
        raise InvalidRequest(f"Unknown setting {unknown[0]!r}; known are {', '.join(names)}.")
    cleaned = {names[key]: _value(key, value, hints[names[key]]) for key, value in values.items()}
    try:
        return kind(**cleaned)
    except TypeError as error:
        raise InvalidRequest(f"A setting is missing: {error}.") from error


def _value(name: str, value: Any, hint: Any) -> Any:
    options = typing.get_args(hint)
    if typing.get_origin(hint) is typing.Literal:
        check(value in options, f"{name} is one of {', '.join(map(str, options))}, not {value!r}.")
        return value
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        if value is None and type(None) in options:
            return None
        return _value(name, value, next(option for option in options if option is not type(None)))
    if typing.get_origin(hint) is tuple:
        check(isinstance(value, list | tuple), f"{name} is a list, not {value!r}.")
        return tuple(_value(name, item, options[0]) for item in value)
    if dataclasses.is_dataclass(hint) and isinstance(value, Mapping):
        return parse(typing.cast(type, hint), value)
    return _scalar(name, value, hint)


def _scalar(name: str, value: Any, hint: Any) -> Any:
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    exact = isinstance(value, hint) and not (isinstance(value, bool) and hint is not bool)
    check(exact, f"{name} is a {getattr(hint, '__name__', hint)}, not {value!r}.")
    return value


def check(holds: bool, sentence: str) -> None:
    """Raise InvalidRequest(sentence) unless ``holds``."""
    if not holds:
        raise InvalidRequest(sentence)


def check_range(name: str, value: float, low: float, high: float) -> None:
    """Raise InvalidRequest unless low ≤ value ≤ high."""
    check(low <= value <= high, f"{name} is between {low:g} and {high:g}, not {value:g}.")
