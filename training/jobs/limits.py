"""How much a visitor may ask of this installation: jobs in the queue, bytes on the disk."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from training.config import check
from training.errors import TrainingFailed

MEBIBYTE = 2**20


@dataclass(frozen=True)
class Limits:
    """None = no limit. Raises InvalidRequest for a number below zero, or a queue that takes nothing."""

    jobs_per_owner: int | None = None
    """Jobs that one owner may have waiting, running and paused at once."""
    disk_mb_per_owner: int | None = None
    """Mebibytes that the folders of one owner's jobs may hold together."""
    free_mb: int = 256
    """Mebibytes that must stay free on the disk: other programs, the log and the database need them."""

    def __post_init__(self) -> None:
        check(self.jobs_per_owner is None or self.jobs_per_owner >= 1, "An owner may have at least one job, or any.")
        check(self.disk_mb_per_owner is None or self.disk_mb_per_owner >= 0, "A disk quota is zero MB or more.")
        check(self.free_mb >= 0, "The free space to keep is zero MB or more.")

    @classmethod
    def of(cls, environment: Mapping[str, str]) -> Limits:
        """From MOLE_MAX_JOBS, MOLE_MAX_DISK_MB and MOLE_MIN_FREE_MB. Raises InvalidRequest."""
        given = {name: number_of(environment, variable) for name, variable in _VARIABLES.items()}
        return cls(**{name: value for name, value in given.items() if value is not None})

    def variables(self) -> dict[str, str]:
        """Inverse of :meth:`of`: what a job's process is told."""
        values = {variable: getattr(self, name) for name, variable in _VARIABLES.items()}
        return {variable: str(value) for variable, value in values.items() if value is not None}

    def check_queue(self, count: int) -> None:
        """Raise InvalidRequest where an owner has ``count`` unfinished jobs, the new one among them, and may not."""
        most = self.jobs_per_owner
        check(
            most is None or count <= most,
            f"At most {most} {'job' if most == 1 else 'jobs'} of yours may wait, run or be paused at once; "
            "let one end or cancel it first.",
        )


NO_LIMITS = Limits()
"""Any number of jobs and bytes, but the disk is not filled to its end."""
_VARIABLES = {
    "jobs_per_owner": "MOLE_MAX_JOBS",
    "disk_mb_per_owner": "MOLE_MAX_DISK_MB",
    "free_mb": "MOLE_MIN_FREE_MB",
}


def number_of(environment: Mapping[str, str], name: str) -> int | None:
    """A whole number out of the environment, None where it is not set. Raises InvalidRequest."""
    text = environment.get(name, "").strip()
    check(not text or text.isdecimal(), f"{name} is a whole number, not {text!r}.")
    return int(text) if text else None


class DiskGuard:
    """Stops a job before the disk is full: asked when it starts and after each of its checkpoints."""

    def __init__(self, limits: Limits, folder: Path, others: Iterable[Path]) -> None:
        """``folder`` of the job and those of its owner's ``others``, measured once."""
        self.limits, self.folder = limits, folder
        self._others = sum(map(size_of, others)) if limits.disk_mb_per_owner is not None else 0

    def check(self) -> None:
        """Raise TrainingFailed with a sentence where the job may not write more."""
        free = shutil.disk_usage(self.folder).free
        if free < self.limits.free_mb * MEBIBYTE:
            raise TrainingFailed(
                f"Only {_words(free)} are free on the disk of the data folder and "
                f"{_words(self.limits.free_mb * MEBIBYTE)} must stay free; remove files, then retry: the job goes on "
                "from its last checkpoint."
            )
        most = self.limits.disk_mb_per_owner
        if most is not None and (used := self._others + size_of(self.folder)) > most * MEBIBYTE:
            raise TrainingFailed(
                f"Your jobs hold {_words(used)} on the disk and may hold {_words(most * MEBIBYTE)}; remove old ones, "
                "then retry: the job goes on from its last checkpoint."
            )


def size_of(folder: Path) -> int:
    """Bytes of the files below a folder; files that vanish meanwhile count nothing."""
    total = 0
    for root, _folders, names in os.walk(folder):
        for name in names:
            try:
                total += os.lstat(os.path.join(root, name)).st_size
            except FileNotFoundError:
                continue
    return total


def _words(size: int) -> str:
    return f"{size / 2**30:.1f} GB" if size >= 2**30 else f"{size / MEBIBYTE:.1f} MB"
