"""What ships with the product: the demo experts, the views of their subjects and the demo compositions."""

from __future__ import annotations

import json
import threading
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

from app.records import Entry
from app.words import rank_words, sentence

__all__ = ["Shipped"]

PICTURES = ("*.png", "*.webp", "*.jpg")


@dataclass(frozen=True)
class Shipped:
    """The read-only part of the library.

    Attributes:
        root: folder with experts/, subjects/ and compositions/ (``assets/demo``).
        reading: held while files are read, which is slow the first time only.
    """

    root: Path
    reading: threading.Lock = field(default_factory=threading.Lock, compare=False, repr=False)

    def entries(self) -> list[Entry]:
        """The shipped experts, ordered by name; empty where the assets are not there."""
        with self.reading:  # the first visit asks several times at once
            return [_entry(path, path.stat().st_mtime_ns, self.root) for path in self._files("experts")]

    def compositions(self) -> list[Path]:
        """The shipped composition files."""
        return self._files("compositions")

    def training_views(self, entry: Entry) -> Path | None:
        """Pictures of a shipped subject that training may see."""
        folder = self.root / "subjects" / entry.path.stem / "train"
        return folder if folder.is_dir() else None

    def _files(self, folder: str) -> list[Path]:
        return sorted((self.root / folder).glob("*.safetensors"))


@lru_cache(maxsize=64)
def _entry(path: Path, _modified: int, root: Path) -> Entry:
    from mole_diffusion.experts import inspect_file

    inspection = inspect_file(path, None)
    folder = root / "subjects" / path.stem
    subject = _subject(folder)
    return Entry(
        sha256=inspection.sha256 or "",
        name=str(subject.get("title") or subject.get("name") or path.stem),
        trigger=str(inspection.trigger or subject.get("trigger") or ""),
        subject_class=str(subject.get("class") or ""),
        family=inspection.base or "demo",
        rank=rank_words(inspection),
        layers=sum(inspection.targets.values()),
        producer=inspection.producer or "",
        size=inspection.size,
        sentence=sentence(inspection, inspection.base or "demo"),
        path=path,
        views=_views(folder),
        builtin=True,
    )


def _subject(folder: Path) -> dict[str, object]:
    file = folder / "subject.json"
    return json.loads(file.read_text()) if file.is_file() else {}


def _views(folder: Path) -> tuple[Path, ...]:
    """Held-out pictures where there are some: training must not see what identity is scored against."""
    for name in ("heldout", "train", "."):
        found = sorted(path for pattern in PICTURES for path in (folder / name).glob(pattern))
        if found:
            return tuple(found[:6])
    return ()
