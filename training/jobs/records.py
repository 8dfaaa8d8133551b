"""What the job store gives: a job, an event, the open requests; and the folder of a job."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from mole_diffusion.errors import InvalidRequest

from .states import State

_ID = re.compile(r"[0-9a-f]{32}")


@dataclass(frozen=True)
class Job:
    """One job as it was when it was read; the columns are explained in :mod:`training.jobs.tables`."""

    id: str
    kind: str
    title: str
    owner: str | None
    config: dict[str, Any]
    priority: int
    devices: int
    state: State
    step: int
    total: int
    loss: float | None
    reason: str | None
    result: dict[str, Any] | None
    attempts: int
    starts: int
    created: float
    started: float | None
    ended: float | None
    heartbeat: float | None
    host: str | None
    worker: str | None
    reference: str | None
    cancel: bool
    pause: bool

    @property
    def pid(self) -> int | None:
        """The process id, where the local executor runs the job."""
        parts = (self.reference or "").split(":")
        return int(parts[2]) if parts[0] == "local" and len(parts) == 5 else None

    @property
    def pid_started(self) -> float | None:
        """When that process started, in seconds since the epoch."""
        return float((self.reference or "").split(":")[3]) if self.pid is not None else None


@dataclass(frozen=True)
class JobEvent:
    """One recorded event; ``number`` grows, so a reader asks for what came after the last one it saw."""

    number: int
    job: str
    time: float
    type: str
    step: int | None
    data: dict[str, Any]


class Requests(NamedTuple):
    """What somebody asks of a running job."""

    cancel: bool
    pause: bool
    save: bool
    sample: bool


def check_id(job_id: str) -> str:
    """``job_id`` if it is one of ours (32 hex digits), so that it can name a folder. Raises InvalidRequest."""
    if not _ID.fullmatch(job_id):
        raise InvalidRequest(f"A job's id is 32 hexadecimal digits, not {job_id!r}.")
    return job_id


def job_folder(data_dir: Path, job_id: str) -> Path:
    """``<data_dir>/jobs/<id>``: config.json, log.txt, checkpoints/, samples/, result."""
    return data_dir / "jobs" / check_id(job_id)
