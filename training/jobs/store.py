"""The job store: SQLAlchemy on SQLite in WAL mode, or a server database by URL.

Every change is one transaction whose first statement writes, so that several processes (page, worker,
child) share the file without dead ends. Reads give frozen :class:`Job` values.
"""

from __future__ import annotations

import re
import socket
import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from sqlalchemy import event

from mole_diffusion.errors import InvalidRequest

from .states import State, sources
from .tables import job_events, jobs, metadata

BUSY_TIMEOUT_MS = 15_000
_ID = re.compile(r"[0-9a-f]{32}")


@dataclass(frozen=True)
class Job:
    """One job as it was when it was read; the columns are explained in :mod:`training.jobs.tables`."""

    id: str
    kind: str
    title: str
    owner: str | None
    config: dict[str, Any]
    state: State
    step: int
    total: int
    loss: float | None
    reason: str | None
    result: dict[str, Any] | None
    attempts: int
    created: float
    started: float | None
    ended: float | None
    heartbeat: float | None
    host: str | None
    pid: int | None
    pid_started: float | None
    cancel: bool


@dataclass(frozen=True)
class JobEvent:
    """One recorded event; ``number`` grows, so a reader asks for what came after the last one it saw."""

    number: int
    job: str
    time: float
    type: str
    step: int | None
    data: dict[str, Any]


def check_id(job_id: str) -> str:
    """``job_id`` if it is one of ours (32 hex digits), so that it can name a folder. Raises InvalidRequest."""
    if not _ID.fullmatch(job_id):
        raise InvalidRequest(f"A job's id is 32 hexadecimal digits, not {job_id!r}.")
    return job_id


def job_folder(data_dir: Path, job_id: str) -> Path:
    """``<data_dir>/jobs/<id>``: config.json, log.txt, checkpoints/, samples/, result."""
    return data_dir / "jobs" / check_id(job_id)


def database_url(data_dir: Path) -> str:
    """The URL of the database of a data folder, which is created if it is missing."""
    data_dir.mkdir(parents=True, exist_ok=True)
    return f"sqlite:///{(data_dir / 'library.db').resolve()}"


def make_engine(url: str) -> sa.Engine:
    """An engine; for SQLite with WAL, a busy timeout and synchronous=NORMAL."""
    engine = sa.create_engine(url)
    if engine.dialect.name == "sqlite":
        event.listen(engine, "connect", _prepare_sqlite)
    return engine


def _prepare_sqlite(connection: Any, _record: Any) -> None:
    cursor = connection.cursor()
    for pragma in (f"busy_timeout={BUSY_TIMEOUT_MS}", "journal_mode=WAL", "synchronous=NORMAL"):
        cursor.execute(f"PRAGMA {pragma}")
    cursor.close()


class JobStore:
    """Jobs and their events. Safe to use from several threads and processes."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.engine = make_engine(url)
        metadata.create_all(self.engine)

    @classmethod
    def of(cls, data_dir: Path) -> JobStore:
        """The store of a data folder."""
        return cls(database_url(data_dir))

    def close(self) -> None:
        """Close all connections."""
        self.engine.dispose()

    def create(self, kind: str, config: Mapping[str, Any], title: str = "", owner: str | None = None) -> str:
        """Queue a job and return its id."""
        job_id = uuid.uuid4().hex
        values = {"id": job_id, "kind": kind, "config": dict(config), "title": title, "owner": owner}
        total = config.get("steps")
        total = total if isinstance(total, int) else 0
        with self.engine.begin() as connection:
            connection.execute(jobs.insert().values(state="queued", created=time.time(), total=total, **values))
            _record(connection, job_id, "state", None, {"state": "queued"})
        return job_id

    def get(self, job_id: str) -> Job:
        """One job. Raises InvalidRequest for an unknown id."""
        with self.engine.connect() as connection:
            row = connection.execute(sa.select(*_COLUMNS).where(jobs.c.id == check_id(job_id))).first()
        if row is None:
            raise InvalidRequest(f"There is no job {job_id}.")
        return Job(**row._mapping)

    def list(
        self,
        states: Sequence[State] | None = None,
        *,
        owner: str | None = None,
        kind: str | None = None,
        limit: int = 100,
    ) -> list[Job]:
        """The newest jobs first, of one owner and kind where they are given."""
        query = sa.select(*_COLUMNS).order_by(jobs.c.number.desc()).limit(limit)
        if states is not None:
            query = query.where(jobs.c.state.in_(states))
        if owner is not None:
            query = query.where(jobs.c.owner == owner)
        if kind is not None:
            query = query.where(jobs.c.kind == kind)
        with self.engine.connect() as connection:
            return [Job(**row._mapping) for row in connection.execute(query)]

    def claim(self) -> Job | None:
        """Take the oldest queued job: it is running now. None if the queue is empty."""
        oldest = sa.select(sa.func.min(jobs.c.number)).where(jobs.c.state == "queued").scalar_subquery()
        now = time.time()
        change = (
            jobs.update()
            .where(jobs.c.number == oldest, jobs.c.state == "queued")
            .values(
                state="running",
                started=sa.func.coalesce(jobs.c.started, now),
                heartbeat=now,
                pid=None,
                pid_started=None,
                host=socket.gethostname(),
                attempts=jobs.c.attempts + 1,
            )
        )
        with self.engine.begin() as connection:
            row = connection.execute(change.returning(jobs.c.id)).first()
            if row is None:
                return None
            _record(connection, row.id, "state", None, {"state": "running"})
        return self.get(row.id)

    def set_state(
        self, job_id: str, state: State, *, reason: str | None = None, result: Mapping[str, Any] | None = None
    ) -> None:
        """Move a job along an allowed transition. Raises InvalidRequest for any other, leaving it unchanged."""
        values: dict[str, Any] = {"state": state}
        if reason is not None:
            values["reason"] = reason
        if result is not None:
            values["result"] = dict(result)
        if state != "queued":
            values["ended"] = time.time()
        change = jobs.update().where(jobs.c.id == check_id(job_id), jobs.c.state.in_(sources(state)))
        with self.engine.begin() as connection:
            if connection.execute(change.values(**values)).rowcount == 1:
                _record(connection, job_id, "state", None, {"state": state, "reason": reason})
                return
        raise InvalidRequest(f"A job that is {self.get(job_id).state} cannot become {state}.")

    def set_process(self, job_id: str, pid: int, pid_started: float) -> None:
        """Remember the child process of a running job."""
        self._update(job_id, pid=pid, pid_started=pid_started, heartbeat=time.time(), host=socket.gethostname())

    def heartbeat(self, job_id: str) -> None:
        """Say that the job's process lives."""
        self._update(job_id, heartbeat=time.time())

    def progress(self, job_id: str, step: int, total: int, loss: float, metrics: Mapping[str, float]) -> None:
        """Record one step; it is a heartbeat too."""
        change = jobs.update().where(jobs.c.id == check_id(job_id))
        with self.engine.begin() as connection:
            connection.execute(change.values(step=step, total=total, loss=loss, heartbeat=time.time()))
            _record(connection, job_id, "progress", step, {"loss": loss, **metrics})

    def checkpointed(self, job_id: str, step: int) -> None:
        """Record a checkpoint: what came before it cannot be lost, so the count of attempts starts again."""
        with self.engine.begin() as connection:
            connection.execute(jobs.update().where(jobs.c.id == check_id(job_id)).values(attempts=1))
            _record(connection, job_id, "saved", step, {})

    def record(self, job_id: str, kind: str, data: Mapping[str, Any], step: int | None = None) -> None:
        """Append an event of type ``kind``: log or sample."""
        with self.engine.begin() as connection:
            _record(connection, check_id(job_id), kind, step, dict(data))

    def request_cancel(self, job_id: str) -> None:
        """Cancel a queued job at once; ask a running one to stop. Nothing happens to one that has ended."""
        self._update(job_id, cancel=True)
        if self.get(job_id).state == "queued":
            try:
                self.set_state(job_id, "cancelled")
            except InvalidRequest:  # a worker was faster: it sees the flag
                return

    def request_save(self, job_id: str) -> None:
        """Ask a running job for a checkpoint now."""
        self._update(job_id, save=True)

    def request_sample(self, job_id: str) -> None:
        """Ask a running job for sample pictures now."""
        self._update(job_id, sample=True)

    def take_flag(self, job_id: str, name: str) -> bool:
        """Read and clear the request ``save`` or ``sample``."""
        column = jobs.c[name]
        change = jobs.update().where(jobs.c.id == check_id(job_id), column.is_(True)).values({name: False})
        with self.engine.begin() as connection:
            return connection.execute(change).rowcount == 1

    def flags(self, job_id: str) -> tuple[bool, bool, bool]:
        """The requests (cancel, save, sample), unchanged."""
        query = sa.select(jobs.c.cancel, jobs.c.save, jobs.c.sample).where(jobs.c.id == check_id(job_id))
        with self.engine.connect() as connection:
            row = connection.execute(query).one()
        return bool(row.cancel), bool(row.save), bool(row.sample)

    def events(
        self, job_id: str, *, after: int = 0, types: Sequence[str] | None = None, limit: int = 10_000
    ) -> list[JobEvent]:
        """Events after number ``after``, oldest first."""
        query = sa.select(job_events).where(job_events.c.job == check_id(job_id), job_events.c.number > after)
        if types is not None:
            query = query.where(job_events.c.type.in_(types))
        with self.engine.connect() as connection:
            rows = connection.execute(query.order_by(job_events.c.number).limit(limit))
            return [JobEvent(**row._mapping) for row in rows]

    def delete(self, job_id: str) -> None:
        """Remove an ended job and its events from the tables; its folder is the caller's to remove."""
        ended = jobs.c.state.in_(["finished", "failed", "cancelled"])
        with self.engine.begin() as connection:
            if connection.execute(jobs.delete().where(jobs.c.id == check_id(job_id), ended)).rowcount:
                connection.execute(job_events.delete().where(job_events.c.job == job_id))
                return
        raise InvalidRequest(f"Job {job_id} is {self.get(job_id).state}: cancel it before removing it.")

    def _update(self, job_id: str, **values: Any) -> None:
        with self.engine.begin() as connection:
            changed = connection.execute(jobs.update().where(jobs.c.id == check_id(job_id)).values(**values))
        if changed.rowcount != 1:
            raise InvalidRequest(f"There is no job {job_id}.")


_COLUMNS = [jobs.c[item.name] for item in fields(Job)]


def _record(connection: sa.Connection, job_id: str, kind: str, step: int | None, data: dict[str, Any]) -> None:
    connection.execute(job_events.insert().values(job=job_id, time=time.time(), type=kind, step=step, data=data))
