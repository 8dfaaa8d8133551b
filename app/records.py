"""The table behind the library, and the entry that the rest of the page sees."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from sqlalchemy import DateTime, Engine, Integer, String, create_engine, event
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

__all__ = ["MAX_NAME", "MAX_TRIGGER", "Entry", "ExpertRow", "open_database"]

MAX_NAME, MAX_TRIGGER = 80, 200
"""Characters. Inspection gives no longer trigger than this."""


class Records(DeclarativeBase):
    """Tables that belong to the library."""


class ExpertRow(Records):
    """One stored expert of one owner; the same content of two owners is one file and two rows."""

    __tablename__ = "experts"

    sha256: Mapped[str] = mapped_column(String(64), primary_key=True)
    owner: Mapped[str] = mapped_column(String(128), primary_key=True, default="")
    name: Mapped[str] = mapped_column(String(MAX_NAME))
    trigger: Mapped[str] = mapped_column(String(MAX_TRIGGER), default="")
    subject_class: Mapped[str] = mapped_column("class", String(MAX_NAME), default="")
    family: Mapped[str] = mapped_column(String(32))
    rank: Mapped[str] = mapped_column(String(32))
    layers: Mapped[int] = mapped_column(Integer)
    producer: Mapped[str] = mapped_column(String(80), default="")
    size: Mapped[int] = mapped_column(Integer)
    sentence: Mapped[str] = mapped_column(String(600), default="")
    added: Mapped[datetime] = mapped_column(DateTime, default=lambda: datetime.now(UTC).replace(tzinfo=None))


@dataclass(frozen=True)
class Entry:
    """An expert of the library as the page shows it.

    Attributes:
        sha256: hash of the file's content, which is also its name in the store.
        family: base family the expert was made for ("demo", "sd21", "sdxl").
        rank: rank in words ("16" or "4 to 32").
        layers: number of modules it changes.
        size: bytes.
        views: reference pictures of the subject, for identity scores; may be empty.
        builtin: shipped with the product: cannot be edited or removed.
    """

    sha256: str
    name: str
    trigger: str
    subject_class: str
    family: str
    rank: str
    layers: int
    producer: str
    size: int
    sentence: str
    path: Path
    added: datetime | None = None
    views: tuple[Path, ...] = ()
    builtin: bool = False

    @property
    def prompt(self) -> str:
        """How the subject is named inside a prompt."""
        return self.trigger or self.name


def open_database(url: str) -> Engine:
    """An engine on ``url`` with the library's tables in place; SQLite files use write-ahead logging."""
    engine = create_engine(url)
    if engine.dialect.name == "sqlite":

        @event.listens_for(engine, "connect")
        def _pragmas(connection: Any, _record: Any) -> None:
            connection.execute("PRAGMA journal_mode=WAL")
            connection.execute("PRAGMA busy_timeout=10000")

    Records.metadata.create_all(engine)
    return engine
