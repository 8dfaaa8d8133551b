"""The job store: SQLAlchemy on SQLite in WAL mode, or a server database by URL.

Every change is one transaction whose first statement writes, so that several processes (page, worker,
child) share the database without dead ends. Reads give frozen :class:`Job` values.

A job's process says which ``start`` of the job it is: its writes hold only while the job runs and was not started
again since; they raise :class:`JobLost` otherwise, so that no job is ever written by two.
"""

from __future__ import annotations

import math
import socket
import time
import uuid
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any

import sqlalchemy as sa

from mole_diffusion.errors import InvalidRequest
from training.config import check, check_range

from .database import LOCK, database_url, make_engine, prepare
from .errors import JobLost
from .limits import NO_LIMITS, Limits
from .records import Job, JobEvent, Requests, check_id, job_folder
from .states import TERMINAL, WAITING, State, sources
from .tables import job_events, jobs

__all__ = ["Job", "JobEvent", "JobStore", "Requests", "check_id", "database_url", "job_folder"]

PRIORITIES = (-1000, 1000)
MOST_DEVICES = 64
FRESH = {"cancel": False, "pause": False, "save": False, "sample": False}


class JobStore:
    """Jobs and their events. Safe to use from several threads and processes."""

    def __init__(self, url: str) -> None:
        """Open the database, completing its tables. Raises InvalidRequest, or StoreUnavailable if it is away."""
        self.url = url
        self.engine = make_engine(url)
        prepare(self.engine)

    @classmethod
    def of(cls, data_dir: Path, url: str | None = None) -> JobStore:
        """The store of a data folder: the database at ``url``, else the folder's own file."""
        return cls(url or database_url(data_dir))

    def close(self) -> None:
        """Close all connections."""
        self.engine.dispose()

    # -- the queue -----------------------------------------------------------------------------------------------

    def create(
        self,
        kind: str,
        config: Mapping[str, Any],
        title: str = "",
        owner: str | None = None,
        *,
        priority: int = 0,
        limits: Limits = NO_LIMITS,
        job_id: str | None = None,
    ) -> str:
        """Queue a job and return its id: ``job_id``, where its folder was made before.

        Raises InvalidRequest, also where the owner has as many jobs as ``limits`` allow.
        ``config["devices"]`` is how many devices it trains on, 1 unless it says otherwise.
        """
        check_range("priority", priority, *PRIORITIES)
        devices, total = config.get("devices", 1), config.get("steps")
        job_id = check_id(job_id) if job_id is not None else uuid.uuid4().hex
        check(type(devices) is int, f"devices is a whole number, not {devices!r}.")
        check_range("devices", devices, 1, MOST_DEVICES)
        values = {"id": job_id, "kind": kind, "config": dict(config), "title": title, "owner": owner}
        values |= {"priority": priority, "devices": devices, "total": total if isinstance(total, int) else 0}
        with self.engine.begin() as connection:
            self._one_at_a_time(connection, owner)
            connection.execute(jobs.insert().values(state="queued", created=time.time(), **values))
            limits.check_queue(_waiting(connection, owner))
            _record(connection, job_id, "state", None, {"state": "queued"})
        return job_id

    def claim(self, worker: str | None = None, devices: int | None = None) -> Job | None:
        """Take the queued job of the highest priority, the oldest of these: it is running now. None if there is none.

        ``devices``: take only jobs that train on so many at most.
        """
        queued = sa.select(jobs.c.number).where(jobs.c.state == "queued")
        if devices is not None:
            queued = queued.where(jobs.c.devices <= devices)
        first = queued.order_by(jobs.c.priority.desc(), jobs.c.number).limit(1)
        chosen = first.with_for_update(skip_locked=True).scalar_subquery()
        now = time.time()
        change = (
            jobs.update()
            .where(jobs.c.number == chosen, jobs.c.state == "queued")
            .values(
                state="running",
                started=sa.func.coalesce(jobs.c.started, now),
                heartbeat=now,
                reference=None,
                host=socket.gethostname(),
                worker=worker,
                attempts=jobs.c.attempts + 1,
                starts=jobs.c.starts + 1,
            )
        )
        with self.engine.begin() as connection:
            row = connection.execute(change.returning(*_COLUMNS)).first()
            if row is None:
                return None
            _record(connection, row.id, "state", None, {"state": "running"})
            return Job(**row._mapping)

    def set_priority(self, job_id: str, priority: int) -> None:
        """Move a waiting job in the queue. Raises InvalidRequest once it no longer waits."""
        check_range("priority", priority, *PRIORITIES)
        if not self._change_if(job_id, ["queued"], priority=priority):
            raise InvalidRequest(f"Job {job_id} is {self.get(job_id).state}; only a queued job has a place to change.")

    # -- reading -------------------------------------------------------------------------------------------------

    def get(self, job_id: str) -> Job:
        """One job. Raises InvalidRequest for an unknown id."""
        with self.engine.connect() as connection:
            row = connection.execute(sa.select(*_COLUMNS).where(jobs.c.id == check_id(job_id))).first()
        if row is None:
            raise InvalidRequest(f"There is no job {job_id}.")
        return Job(**row._mapping)

    def list(
        self,
        states: Collection[State] | None = None,
        *,
        owner: str | None = None,
        kind: str | None = None,
        limit: int | None = 100,
    ) -> list[Job]:
        """The newest jobs first, of one owner ("" = those without one) and kind where they are given."""
        query = sa.select(*_COLUMNS).order_by(jobs.c.number.desc()).limit(limit)
        if states is not None:
            query = query.where(jobs.c.state.in_(states))
        if owner is not None:
            query = query.where(_owned(owner or None))
        if kind is not None:
            query = query.where(jobs.c.kind == kind)
        with self.engine.connect() as connection:
            return [Job(**row._mapping) for row in connection.execute(query)]

    def siblings(self, job_id: str) -> Sequence[str]:
        """The ids of the other jobs of a job's owner; the single user's where it has none."""
        owner = self.get(job_id).owner
        query = sa.select(jobs.c.id).where(_owned(owner), jobs.c.id != job_id)
        with self.engine.connect() as connection:
            return list(connection.execute(query).scalars())

    def events(
        self, job_id: str, *, after: int = 0, types: Sequence[str] | None = None, limit: int = 10_000
    ) -> Sequence[JobEvent]:
        """Events after number ``after``, oldest first."""
        query = sa.select(job_events).where(job_events.c.job == check_id(job_id), job_events.c.number > after)
        if types is not None:
            query = query.where(job_events.c.type.in_(types))
        with self.engine.connect() as connection:
            rows = connection.execute(query.order_by(job_events.c.number).limit(limit))
            return [JobEvent(**row._mapping) for row in rows]

    # -- what a job's process and its worker write -----------------------------------------------------------------

    def set_state(
        self,
        job_id: str,
        state: State,
        *,
        reason: str | None = None,
        result: Mapping[str, Any] | None = None,
        start: int | None = None,
    ) -> None:
        """Move a job along an allowed transition. Raises InvalidRequest for any other, leaving it unchanged.

        With ``start``, only while the job runs in that start: raises JobLost otherwise.
        """
        values: dict[str, Any] = {"state": state}
        if reason is not None:
            values["reason"] = reason.replace("\0", "")  # PostgreSQL's text has no such character
        if result is not None:
            values["result"] = _finite(result)
        if state in TERMINAL:
            values["ended"] = time.time()
        change = jobs.update().where(jobs.c.id == check_id(job_id), jobs.c.state.in_(sources(state)))
        if start is not None:
            change = change.where(_running(start))
        if state == "paused":  # a cancel that came a moment ago counts for more
            change = change.where(jobs.c.cancel.is_(False))
        with self.engine.begin() as connection:
            if connection.execute(change.values(**values)).rowcount == 1:
                _record(connection, job_id, "state", None, {"state": state, "reason": values.get("reason")})
                return
        now = self.get(job_id)
        if state == "paused" and now.state == "running" and now.cancel and start in (None, now.starts):
            return self.set_state(job_id, "cancelled", start=start)
        if start is not None and (now.starts != start or now.state != "running"):
            raise _lost(job_id)
        raise InvalidRequest(f"A job that is {now.state} cannot become {state}.")

    def set_reference(self, job_id: str, reference: str, start: int | None = None) -> None:
        """Remember by what the executor finds the process of a running job again."""
        self._update(job_id, start, reference=reference, heartbeat=time.time(), host=socket.gethostname())

    def heartbeat(self, job_id: str, start: int | None = None) -> None:
        """Say that the job's process lives."""
        self._update(job_id, start, heartbeat=time.time())

    def progress(
        self,
        job_id: str,
        step: int,
        total: int,
        loss: float,
        metrics: Mapping[str, float],
        start: int | None = None,
    ) -> None:
        """Record one step; it is a heartbeat too. A metric that is no number at this step is left out."""
        with self.engine.begin() as connection:
            _change(connection, job_id, start, step=step, total=total, loss=loss, heartbeat=time.time())
            _record(connection, job_id, "progress", step, {"loss": loss, **metrics})

    def checkpointed(self, job_id: str, step: int, start: int | None = None) -> None:
        """Record a checkpoint: what came before it cannot be lost, so the count of attempts starts again."""
        with self.engine.begin() as connection:
            _change(connection, job_id, start, attempts=1, heartbeat=time.time())
            _record(connection, job_id, "saved", step, {})

    def record(
        self, job_id: str, kind: str, data: Mapping[str, Any], step: int | None = None, start: int | None = None
    ) -> None:
        """Append an event of type ``kind``: log or sample."""
        with self.engine.begin() as connection:
            if start is not None:
                _change(connection, job_id, start, heartbeat=time.time())
            _record(connection, check_id(job_id), kind, step, data)

    def requests(self, job_id: str, start: int | None = None) -> Requests:
        """What is asked of a job, unchanged. With ``start``, raises JobLost where the job is no longer that start's."""
        columns = [jobs.c[name] for name in Requests._fields]
        query = sa.select(*columns, jobs.c.state, jobs.c.starts).where(jobs.c.id == check_id(job_id))
        with self.engine.connect() as connection:
            row = connection.execute(query).first()
        if row is None or (start is not None and (row.starts != start or row.state != "running")):
            raise _lost(job_id)
        return Requests(*(bool(getattr(row, name)) for name in Requests._fields))

    def take(self, job_id: str, name: str, start: int | None = None) -> bool:
        """Read and clear the request ``save`` or ``sample``."""
        change = jobs.update().where(jobs.c.id == check_id(job_id), jobs.c[name].is_(True)).values({name: False})
        if start is not None:
            change = change.where(_running(start))
        with self.engine.begin() as connection:
            return connection.execute(change).rowcount == 1

    # -- what people ask -------------------------------------------------------------------------------------------

    def request_cancel(self, job_id: str) -> None:
        """Cancel a waiting or paused job at once; ask a running one to stop. One that has ended stays as it is."""
        self._update(job_id, cancel=True)
        if self.get(job_id).state in ("queued", "paused"):
            try:
                self.set_state(job_id, "cancelled")
            except InvalidRequest:  # a worker was faster: it sees the flag
                return

    def request_pause(self, job_id: str) -> None:
        """Ask a running job to write a checkpoint and free its device. Raises InvalidRequest for any other."""
        self._ask(job_id, "pause")

    def request_save(self, job_id: str) -> None:
        """Ask a running job for a checkpoint now. Raises InvalidRequest for any other."""
        self._ask(job_id, "save")

    def request_sample(self, job_id: str) -> None:
        """Ask a running job for sample pictures now. Raises InvalidRequest for any other."""
        self._ask(job_id, "sample")

    def resume(self, job_id: str, *, limits: Limits = NO_LIMITS) -> None:
        """Queue a paused or cancelled job again: it goes on from its checkpoint. Raises InvalidRequest for others."""
        self._requeue(job_id, ["paused", "cancelled"], "resumed", limits)

    def retry(self, job_id: str, *, limits: Limits = NO_LIMITS) -> None:
        """Queue a failed job again: it goes on from its last checkpoint. Raises InvalidRequest for any other."""
        self._requeue(job_id, ["failed"], "tried again", limits)

    # -- removing --------------------------------------------------------------------------------------------------

    def delete(self, job_id: str) -> None:
        """Remove an ended job and its events from the tables; its folder is the caller's to remove."""
        with self.engine.begin() as connection:
            ended = jobs.delete().where(jobs.c.id == check_id(job_id), jobs.c.state.in_(TERMINAL))
            if connection.execute(ended).rowcount:
                connection.execute(job_events.delete().where(job_events.c.job == job_id))
                return
        raise InvalidRequest(f"Job {job_id} is {self.get(job_id).state}: cancel it before removing it.")

    @contextmanager
    def held_ended(self, job_id: str) -> Iterator[bool]:
        """Whether the job has ended; if so, nobody can start it again before the block is left. Keep it short."""
        same = jobs.update().where(jobs.c.id == check_id(job_id), jobs.c.state.in_(TERMINAL)).values(state=jobs.c.state)
        with self.engine.begin() as connection:
            yield connection.execute(same).rowcount == 1

    def forget(self, job_id: str, types: Sequence[str]) -> None:
        """Remove a job's events of some types."""
        events = job_events.delete().where(job_events.c.job == check_id(job_id), job_events.c.type.in_(types))
        with self.engine.begin() as connection:
            connection.execute(events)

    # -- inside ----------------------------------------------------------------------------------------------------

    def _ask(self, job_id: str, name: str) -> None:
        if not self._change_if(job_id, ["running"], **{name: True}):
            raise InvalidRequest(
                f"Job {job_id} is {self.get(job_id).state}; only a running job can be asked to {name}."
            )

    def _requeue(self, job_id: str, states: Sequence[State], words: str, limits: Limits) -> None:
        job = self.get(job_id)
        fresh = {**FRESH, "reason": None, "result": sa.null(), "ended": None, "attempts": 0}
        change = jobs.update().where(jobs.c.id == job_id, jobs.c.state.in_(states)).values(state="queued", **fresh)
        with self.engine.begin() as connection:
            self._one_at_a_time(connection, job.owner)
            if connection.execute(change).rowcount == 1:
                limits.check_queue(_waiting(connection, job.owner))
                _record(connection, job_id, "state", None, {"state": "queued"})
                return
        known = " or ".join(states)
        raise InvalidRequest(f"Job {job_id} is {self.get(job_id).state}; only a {known} job can be {words}.")

    def _one_at_a_time(self, connection: sa.Connection, owner: str | None) -> None:
        """Let nobody else change this owner's queue before the transaction ends; on SQLite the first write does so."""
        if self.engine.dialect.name == "postgresql":
            connection.execute(sa.select(sa.func.pg_advisory_xact_lock(LOCK, sa.func.hashtext(owner or ""))))

    def _change_if(self, job_id: str, states: Sequence[State], **values: Any) -> bool:
        change = jobs.update().where(jobs.c.id == check_id(job_id), jobs.c.state.in_(states)).values(**values)
        with self.engine.begin() as connection:
            return connection.execute(change).rowcount == 1

    def _update(self, job_id: str, start: int | None = None, **values: Any) -> None:
        with self.engine.begin() as connection:
            _change(connection, job_id, start, **values)


_COLUMNS = [jobs.c[item.name] for item in fields(Job)]


def _running(start: int) -> sa.ColumnElement[bool]:
    return sa.and_(jobs.c.state == "running", jobs.c.starts == start)


def _owned(owner: str | None) -> sa.ColumnElement[bool]:
    return jobs.c.owner.is_(None) if owner is None else jobs.c.owner == owner


def _waiting(connection: sa.Connection, owner: str | None) -> int:
    query = sa.select(sa.func.count()).select_from(jobs).where(_owned(owner), jobs.c.state.in_(WAITING))
    return connection.execute(query).scalar_one()


def _change(connection: sa.Connection, job_id: str, start: int | None, **values: Any) -> None:
    change = jobs.update().where(jobs.c.id == check_id(job_id)).values(**values)
    if start is not None:
        change = change.where(_running(start))
    if connection.execute(change).rowcount != 1:
        raise InvalidRequest(f"There is no job {job_id}.") if start is None else _lost(job_id)


def _lost(job_id: str) -> JobLost:
    return JobLost(f"Job {job_id} is no longer this process's: it ended, or was started again; it stops here.")


def _record(connection: sa.Connection, job_id: str, kind: str, step: int | None, data: Mapping[str, Any]) -> None:
    values = {"job": job_id, "time": time.time(), "type": kind, "step": step, "data": _finite(data)}
    connection.execute(job_events.insert().values(**values))


def _finite(data: Mapping[str, Any]) -> dict[str, Any]:
    """JSON has neither NaN nor infinity, and a server refuses them: such values are left out."""
    kept = {}
    for name, value in data.items():
        if isinstance(value, Mapping):
            kept[name] = _finite(value)
        elif not isinstance(value, float) or math.isfinite(value):
            kept[name] = value.replace("\0", "") if isinstance(value, str) else value
    return kept
