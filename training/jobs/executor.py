"""Where a job's process runs. The local executor starts one child in a session of its own."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import psutil

from .store import job_folder

_SECRET = re.compile(
    r"TOKEN(?!IZERS)|SECRET|PASSWORD|PASSWD|CREDENTIAL|API_?KEY|ACCESS_KEY|^OAUTH|^OPENID", re.IGNORECASE
)
REPOSITORY = Path(__file__).resolve().parents[2]
NICENESS = 5
SAME_START = 2.0  # seconds by which two readings of one process's start may differ


class Process(Protocol):
    """A job's process: ours by birth, or adopted after a restart."""

    pid: int
    started: float

    def alive(self) -> bool:
        """Whether it still runs; a zombie does not."""
        ...

    def terminate(self) -> None:
        """Ask it and its children to stop."""
        ...

    def kill(self) -> None:
        """End it and its children now."""
        ...


class Executor(Protocol):
    """Starts job processes and finds them again."""

    def start(self, job_id: str, data_dir: Path) -> Process:
        """Start the job's process."""
        ...

    def adopt(self, pid: int, started: float) -> Process | None:
        """The process that was started earlier, or None if it no longer lives."""
        ...


@dataclass
class LocalProcess:
    """A process group on this machine, led by ``pid``."""

    pid: int
    started: float
    child: subprocess.Popen[bytes] | None = None

    def alive(self) -> bool:
        """Whether the leader runs; reaps it if it is our child."""
        if self.child is not None:
            return self.child.poll() is None
        return is_alive(self.pid, self.started)

    def terminate(self) -> None:
        """SIGTERM to the group: the trainer writes a checkpoint and stops."""
        self._signal(signal.SIGTERM)

    def kill(self) -> None:
        """SIGKILL to the group."""
        self._signal(signal.SIGKILL)
        if self.child is not None:
            self.child.wait()

    def _signal(self, number: int) -> None:
        if self.alive():
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.pid, number)


def training_command(job_id: str, data_dir: Path) -> list[str]:
    """The argument list of a job's process."""
    return [sys.executable, "-m", "training", "run-job", job_id, "--data-dir", str(data_dir)]


class LocalExecutor:
    """Runs :func:`training_command` (or another command, for tests) at a lower priority, without secrets."""

    def __init__(
        self, command: Callable[[str, Path], Sequence[str]] = training_command, device: str | None = None
    ) -> None:
        """``device``: where jobs train; None or "auto" = the best there is."""
        self.command, self.device = command, device

    def start(self, job_id: str, data_dir: Path) -> LocalProcess:
        """Start the child in its own session; its output is appended to the job's log.txt."""
        folder = job_folder(data_dir, job_id)
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / "log.txt").open("ab") as log:
            child = subprocess.Popen(
                list(self.command(job_id, data_dir.resolve())),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                cwd=REPOSITORY,
                env=child_environment() | ({"MOLE_DEVICE": self.device} if self.device else {}),
                start_new_session=True,
            )
        with contextlib.suppress(psutil.Error):
            psutil.Process(child.pid).nice(NICENESS)
        return LocalProcess(child.pid, process_start(child.pid), child)

    def adopt(self, pid: int, started: float) -> LocalProcess | None:
        """The child of an earlier worker, if it still lives."""
        return LocalProcess(pid, started) if is_alive(pid, started) else None


def child_environment() -> dict[str, str]:
    """This process's environment without tokens, secrets and passwords, and with an unbuffered log."""
    kept = {name: value for name, value in os.environ.items() if not _SECRET.search(name)}
    return {**kept, "PYTHONUNBUFFERED": "1"}


def process_start(pid: int) -> float:
    """When the process started, in seconds since the epoch; 0.0 if it is gone already."""
    try:
        return psutil.Process(pid).create_time()
    except psutil.Error:
        return 0.0


def is_alive(pid: int, started: float) -> bool:
    """Whether the process ``pid`` that started at ``started`` runs and is no zombie."""
    try:
        process = psutil.Process(pid)
        same = abs(process.create_time() - started) < SAME_START
        return same and process.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False
