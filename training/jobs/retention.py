"""What is removed from the folders of jobs that have ended. The jobs themselves stay in the table, and so do results.

Nothing of a job that waits, runs or is paused is touched: a job is held in its end while its files are moved aside.
"""

from __future__ import annotations

import os
import shutil
import time
import uuid
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from training.config import check

from .limits import number_of, size_of
from .states import TERMINAL
from .store import Job, JobStore, job_folder

DAY = 86_400.0
TRASH = ".removed-"
RESULT = "result"
HISTORY = ("progress", "log", "sample", "saved")


@dataclass(frozen=True)
class Retention:
    """How long the folders of ended jobs are kept; None = for ever. Raises InvalidRequest below zero."""

    days: float | None = None
    """Days after its end until a job's samples, log, history and checkpoints are removed."""
    per_owner: int | None = None
    """Newest ended jobs of one owner whose folders are kept."""

    def __post_init__(self) -> None:
        check(self.days is None or self.days >= 0, "Jobs are kept for zero days or more.")
        check(self.per_owner is None or self.per_owner >= 0, "Zero jobs or more are kept for each owner.")


    @classmethod
    def of(cls, environment: Mapping[str, str]) -> Retention:
        """From MOLE_KEEP_DAYS and MOLE_KEEP_JOBS. Raises InvalidRequest."""
        days, jobs = (number_of(environment, name) for name in ("MOLE_KEEP_DAYS", "MOLE_KEEP_JOBS"))
        return cls(days, jobs)


KEEP_ALL = Retention()
"""Only the checkpoints of finished jobs are removed."""


@dataclass(frozen=True)
class Pruned:
    """What one round removed."""

    jobs: int = 0
    """Jobs of which something was removed."""
    bytes: int = 0


def prune(store: JobStore, data_dir: Path, policy: Retention = KEEP_ALL, now: float | None = None) -> Pruned:
    """Remove the checkpoints of finished jobs, and all but the results of those that are too old or too many."""
    time_now = time.time() if now is None else now
    removed: list[int | None] = []
    for left in (data_dir / "jobs").glob(f"{TRASH}*"):  # by a round that was killed
        _remove(left)
    kept: Counter[str | None] = Counter()
    for job in store.list(TERMINAL, limit=None):
        kept[job.owner] += 1
        age = time_now - (job.ended or job.created)
        too_old = policy.days is not None and age > policy.days * DAY
        too_many = policy.per_owner is not None and kept[job.owner] > policy.per_owner
        names = _outdated(data_dir, job) if too_old or too_many else _needless(data_dir, job)
        if names:
            removed.append(_prune_job(store, data_dir, job, names))
            if too_old or too_many:
                store.forget(job.id, HISTORY)
    sizes = [size for size in removed if size is not None]
    return Pruned(jobs=len(sizes), bytes=sum(sizes))


def remove_folder(data_dir: Path, job_id: str) -> None:
    """Remove all files of a job that is no longer in the table."""
    shutil.rmtree(job_folder(data_dir, job_id), ignore_errors=True)


def _needless(data_dir: Path, job: Job) -> list[Path]:
    checkpoints = job_folder(data_dir, job.id) / "checkpoints"
    return [checkpoints] if job.state == "finished" and checkpoints.is_dir() else []


def _outdated(data_dir: Path, job: Job) -> list[Path]:
    folder = job_folder(data_dir, job.id)
    named = data_dir / str((job.result or {}).get("path", ""))
    return [path for path in _entries(folder) if path != named and not path.name.startswith(f"{RESULT}.")]


def _entries(folder: Path) -> Iterable[Path]:
    return sorted(folder.iterdir()) if folder.is_dir() else []


def _prune_job(store: JobStore, data_dir: Path, job: Job, names: Iterable[Path]) -> int | None:
    """Bytes that were removed; None where the job was started again meanwhile."""
    trash = data_dir / "jobs" / f"{TRASH}{uuid.uuid4().hex}"
    with store.held_ended(job.id) as ended:
        if not ended:
            return None
        trash.mkdir()
        for path in names:
            try:
                os.replace(path, trash / path.name)
            except FileNotFoundError:  # another worker's round was faster
                continue
    folder = job_folder(data_dir, job.id)
    if folder.is_dir() and not any(folder.iterdir()):
        folder.rmdir()
    return _remove(trash)


def _remove(folder: Path) -> int:
    size = size_of(folder)
    shutil.rmtree(folder, ignore_errors=True)
    return size
