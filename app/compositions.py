"""Trained gates that are ready for use: the shipped ones and those that this installation's jobs have made."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from app.shipped import Shipped
from mole_diffusion.errors import MoleError

__all__ = ["Compositions", "Trained"]

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Trained:
    """A composition file as the page offers it.

    Attributes:
        family: base family it was trained on.
        experts: hashes of its experts, in the order of the gates.
        recipe: how it was trained, as saved in the file.
    """

    path: Path
    family: str
    experts: tuple[str, ...]
    names: tuple[str, ...]
    recipe: dict[str, Any]
    shipped: bool

    @property
    def title(self) -> str:
        """The subjects, joined."""
        return " + ".join(self.names)


class Compositions:
    """Finds trained gates by the set of subjects they were trained for.

    Args:
        shipped: the demo's compositions.
        finished: gives the composition files of an owner's finished jobs, newest first.
    """

    def __init__(self, shipped: Shipped, finished: Callable[[str], Sequence[Path]]) -> None:
        self._shipped = shipped
        self._finished = finished

    def list(self, owner: str = "") -> list[Trained]:
        """Every readable composition, the owner's newest first, then the shipped ones."""
        own = [_read(path, path.stat().st_mtime_ns, False) for path in self._finished(owner) if path.is_file()]
        shipped = [_read(path, path.stat().st_mtime_ns, True) for path in self._shipped.compositions()]
        return [found for found in own + shipped if found is not None]

    def for_subjects(self, experts: Sequence[str], owner: str = "", wanted: Path | None = None) -> Trained | None:
        """Gates for exactly these subjects: those in the file ``wanted`` where they are, else the newest, or None."""
        fitting = [found for found in self.list(owner) if set(found.experts) == set(experts)]
        return next((found for found in fitting if found.path == wanted), next(iter(fitting), None))


@lru_cache(maxsize=256)
def _read(path: Path, _modified: int, shipped: bool) -> Trained | None:
    from mole_diffusion.persist import read_composition_header

    try:
        header = read_composition_header(path)
    except MoleError as error:
        logger.warning("Skipping %s: %s", path.name, error)
        return None
    experts = header["experts"]
    return Trained(
        path=path,
        family=str(header["base"] or ""),
        experts=tuple(str(e["sha256"]) for e in experts),
        names=tuple(str(e["name"]) for e in experts),
        recipe=dict(header.get("recipe") or {}),
        shipped=shipped,
    )
