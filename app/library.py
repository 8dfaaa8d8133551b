"""The library: experts stored under the hash of their content, with names, triggers and views of their subjects."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import os
import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from sqlalchemy import Engine, delete, func, select
from sqlalchemy.orm import Session

from app.pictures import open_picture, png_bytes
from app.records import MAX_NAME, MAX_TRIGGER, Entry, ExpertRow
from app.shipped import Shipped
from app.words import FAMILIES, rank_words, sentence
from mole_diffusion.errors import InvalidFile, InvalidRequest, MoleError

if TYPE_CHECKING:
    from mole_diffusion.bases import Base
    from mole_diffusion.experts import Expert
    from mole_diffusion.experts.inspect import Inspection

__all__ = ["Added", "Library"]

MAX_VIEWS = 6


@dataclass(frozen=True)
class Added:
    """What became of an uploaded file: its entry, whether it was there before, and what to look out for."""

    entry: Entry
    known: bool
    warnings: tuple[str, ...] = ()


class Library:
    """Experts of the shipped demo and of each owner. ``owner`` is "" where the page has one user.

    Args:
        engine: database from :func:`app.records.open_database`.
        data_dir: holds ``experts/<sha256>.safetensors`` and ``subjects/<key>/NN.png``.
        shipped: the read-only experts.
        bases: names of the bases that files are compared with, the likeliest first.
    """

    def __init__(self, engine: Engine, data_dir: Path, shipped: Shipped, bases: Sequence[str] = ("demo",)) -> None:
        self._engine = engine
        self._bases = tuple(bases)
        self._data_dir = data_dir
        self._shipped = shipped

    # -- reading -----------------------------------------------------------------------------------------------

    def entries(self, owner: str = "") -> list[Entry]:
        """The owner's experts, newest first, then the shipped ones."""
        with Session(self._engine) as session:
            query = select(ExpertRow).where(ExpertRow.owner == owner).order_by(ExpertRow.added.desc())
            own = [self._entry(row) for row in session.scalars(query)]
        return own + self._shipped.entries()

    def get(self, sha256: str, owner: str = "") -> Entry:
        """One entry. Raises InvalidRequest when this owner has no such expert."""
        for entry in self.entries(owner):
            if entry.sha256 == sha256:
                return entry
        raise InvalidRequest("This subject is no longer in the library; choose another or upload its file again.")

    def load(self, sha256: str, owner: str = "") -> Expert:
        """The expert behind an entry, with the library's name and trigger."""
        from mole_diffusion.experts import Expert

        entry = self.get(sha256, owner)
        return replace(Expert.load(entry.path), name=entry.name, trigger=entry.trigger or None)

    def inspect(self, path: Path) -> tuple[Inspection, str]:
        """What a file is, and the family of bases it fits ("" where it fits none); stores nothing.

        A file that names its base is compared with that base, any other with each base until one fits.
        """
        from mole_diffusion.experts import inspect_file

        seen = inspect_file(path, None)
        if not seen.ok:
            return seen, ""
        bases = [base for base in self._known_bases() if seen.base in (None, base.family)]
        for base in bases:
            fitting = inspect_file(path, base)
            if fitting.ok:
                return fitting, base.family
            misfit = fitting
        if len({base.family for base in bases}) == 1:
            return misfit, ""
        made_for = FAMILIES.get(seen.base or "", seen.base) or "a model that is not offered here"
        offered = ", ".join(dict.fromkeys(FAMILIES.get(base.family, base.title) for base in self._known_bases()))
        reason = f"This LoRA was made for {made_for}, and none of the bases here fits it: {offered}."
        return replace(seen, ok=False, reason=reason), ""

    def _known_bases(self) -> list[Base]:
        from mole_diffusion.bases import get_base

        found = []
        for name in self._bases:
            with contextlib.suppress(MoleError):  # a base whose files are missing fits nothing
                found.append(get_base(name))
        return found

    # -- writing -----------------------------------------------------------------------------------------------

    def add(self, path: Path, filename: str, owner: str = "") -> Added:
        """Store an uploaded file. Raises InvalidFile with the reason when it is refused: then nothing is kept."""
        inspection, family = self.inspect(path)
        if not inspection.ok or not inspection.sha256:
            raise InvalidFile(inspection.reason or f"{filename} is not a LoRA this page can use.")
        sha256 = inspection.sha256
        for entry in self.entries(owner):
            if entry.sha256 == sha256:
                return Added(entry, known=True, warnings=(f"This file is already in the library as “{entry.name}”.",))
        self._store(path, sha256)
        entry = self._insert(path, filename, inspection, family, owner)
        return Added(entry, known=False, warnings=tuple(self.warnings(entry, owner)))

    def update(self, sha256: str, owner: str = "", *, name: str, trigger: str, subject_class: str) -> Entry:
        """Change the words of an entry. Raises InvalidRequest for a shipped or missing one, no name, or long words."""
        self._own(sha256, owner)
        name, trigger, subject_class = name.strip(), trigger.strip(), subject_class.strip()
        if not name:
            raise InvalidRequest("A subject needs a name; the field was empty.")
        _check_length("name", name, MAX_NAME)
        _check_length("trigger", trigger, MAX_TRIGGER)
        _check_length("class", subject_class, MAX_NAME)
        with Session(self._engine) as session, session.begin():
            row = session.get_one(ExpertRow, (sha256, owner))
            row.name, row.trigger, row.subject_class = name, trigger, subject_class
        return self.get(sha256, owner)

    def remove(self, sha256: str, owner: str = "") -> None:
        """Forget an entry, its views, and its file once nobody uses it. Raises InvalidRequest for a shipped one."""
        self._own(sha256, owner)
        with Session(self._engine) as session, session.begin():
            session.execute(delete(ExpertRow).where(ExpertRow.sha256 == sha256, ExpertRow.owner == owner))
            users = session.scalar(select(func.count()).where(ExpertRow.sha256 == sha256))
        shutil.rmtree(self._views_folder(sha256, owner), ignore_errors=True)
        if not users:
            self._file(sha256).unlink(missing_ok=True)

    def set_views(self, sha256: str, owner: str = "", *, pictures: Sequence[Path]) -> Entry:
        """Replace the 1 to 6 pictures that show the subject; stored as PNG without metadata.

        Raises InvalidFile for a picture that cannot be read and InvalidRequest for too many; the old ones stay.
        """
        self._own(sha256, owner)
        if not 1 <= len(pictures) <= MAX_VIEWS:
            raise InvalidRequest(f"Between 1 and {MAX_VIEWS} pictures of a subject are needed; {len(pictures)} came.")
        clean = [png_bytes(open_picture(path)) for path in pictures]
        folder = self._views_folder(sha256, owner)
        fresh = folder.with_name(folder.name + ".new")
        shutil.rmtree(fresh, ignore_errors=True)
        fresh.mkdir(parents=True)
        for index, content in enumerate(clean):
            (fresh / f"{index:02d}.png").write_bytes(content)
        shutil.rmtree(folder, ignore_errors=True)
        fresh.rename(folder)
        return self.get(sha256, owner)

    def warnings(self, entry: Entry, owner: str = "") -> list[str]:
        """Sentences about what may go wrong with this entry beside the others."""
        found: list[str] = []
        if not entry.trigger:
            found.append("The file names no trigger word; enter the one it was trained with.")
        for other in self.entries(owner):
            same = entry.trigger.casefold() == other.trigger.casefold() and entry.trigger
            if same and other.sha256 != entry.sha256 and other.family == entry.family:
                found.append(
                    f"“{other.name}” has the same trigger “{entry.trigger}”: a prompt cannot tell them apart; "
                    "change one of them before composing both."
                )
        return found

    # -- inside ------------------------------------------------------------------------------------------------

    def training_views(self, entry: Entry) -> Path | None:
        """Folder of pictures that gates may learn from: for a shipped subject not those it is scored against."""
        if entry.builtin:
            return self._shipped.training_views(entry)
        return entry.views[0].parent if entry.views else None

    def materialise(self, entry: Entry) -> None:
        """Put a shipped expert's file where a training job looks for it."""
        if not self._file(entry.sha256).is_file():
            self._store(entry.path, entry.sha256)

    def _own(self, sha256: str, owner: str) -> None:
        if self.get(sha256, owner).builtin:
            raise InvalidRequest("The demo's subjects are fixed; upload the file under your own name to change it.")

    def _insert(self, path: Path, filename: str, inspection: Inspection, family: str, owner: str) -> Entry:
        from mole_diffusion.experts import read_header

        sha256 = inspection.sha256 or ""
        row = ExpertRow(
            sha256=sha256,
            owner=owner,
            name=self._free_name(_readable_name(filename), owner),
            trigger=inspection.trigger or "",
            subject_class=read_header(path).metadata.get("mole.class", "")[:MAX_NAME],
            family=family,
            rank=rank_words(inspection),
            layers=sum(inspection.targets.values()),
            producer=(inspection.producer or "")[:80],
            size=inspection.size,
            sentence=sentence(inspection, family)[:600],
        )
        with Session(self._engine) as session, session.begin():
            session.add(row)
        return self.get(sha256, owner)

    def _free_name(self, name: str, owner: str) -> str:
        """The name, or the name with a number: two subjects of one picture need different ones."""
        taken = {entry.name.casefold() for entry in self.entries(owner)}
        candidates = (name if number == 1 else f"{name} {number}" for number in itertools.count(1))
        return next(candidate for candidate in candidates if candidate.casefold() not in taken)

    def _store(self, path: Path, sha256: str) -> None:
        target = self._file(sha256)
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = target.with_name(f".{sha256}.{os.getpid()}.part")
        shutil.copyfile(path, temporary)
        os.replace(temporary, target)

    def _file(self, sha256: str) -> Path:
        return self._data_dir / "experts" / f"{sha256}.safetensors"

    def _views_folder(self, sha256: str, owner: str) -> Path:
        key = sha256 if not owner else hashlib.sha256(f"{owner}/{sha256}".encode()).hexdigest()
        return self._data_dir / "subjects" / key

    def _entry(self, row: ExpertRow) -> Entry:
        return Entry(
            sha256=row.sha256,
            name=row.name,
            trigger=row.trigger,
            subject_class=row.subject_class,
            family=row.family,
            rank=row.rank,
            layers=row.layers,
            producer=row.producer,
            size=row.size,
            sentence=row.sentence,
            path=self._file(row.sha256),
            added=row.added,
            views=tuple(sorted(self._views_folder(row.sha256, row.owner).glob("*.png"))),
        )


def _check_length(what: str, words: str, most: int) -> None:
    if len(words) > most:
        raise InvalidRequest(f"The {what} may have {most} characters; this one has {len(words)}. Shorten it.")


def _readable_name(filename: str) -> str:
    """A first name, short enough for a number after it."""
    words = re.sub(r"[\W_]+", " ", Path(filename).stem).strip()
    return words[: MAX_NAME - 4].strip() or "subject"
