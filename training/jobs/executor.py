"""Where a job's process runs: a small protocol, so that a cluster fits behind it, and the local executor.

The local executor starts one child in a session of its own, or torch's launcher where a job trains on several devices.
Every process of a job carries the job's mark in its environment: that is how those are found that left the session.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import psutil

from .database import URL_VARIABLE, is_server
from .limits import Limits
from .store import job_folder

MARK = "MOLE_JOB"
_SECRET = re.compile(
    r"TOKEN(?!IZERS)|SECRET|PASSWORD|PASSWD|CREDENTIAL|API_?KEY|ACCESS_KEY|DATABASE_URL|^OAUTH|^OPENID", re.IGNORECASE
)
REPOSITORY = Path(__file__).resolve().parents[2]
NICENESS = 5
SAME_START = 2.0  # seconds by which two readings of one process's start may differ
SWEEPS = 5  # looks for processes that were born while others were killed


class Process(Protocol):
    """A start of a job: ours by birth, or found again by its reference."""

    @property
    def reference(self) -> str:
        """What :meth:`Executor.adopt` finds it by, on any machine that the executor reaches."""
        ...

    def alive(self) -> bool:
        """Whether it still runs."""
        ...

    def terminate(self) -> None:
        """Ask it to write a checkpoint and stop."""
        ...

    def kill(self) -> None:
        """End it and everything that it has started, now. Nothing happens where nothing is left."""
        ...


class Executor(Protocol):
    """Starts jobs and finds them again."""

    def start(self, job_id: str, data_dir: Path, start: int = 1, devices: int = 1) -> Process:
        """Begin the job's ``start``-th start on so many devices. Raises OSError where that is impossible."""
        ...

    def adopt(self, reference: str) -> Process:
        """What was started earlier; it may have ended since."""
        ...


@dataclass
class LocalProcess:
    """A process group on one machine, led by ``pid``, and all that carry its mark."""

    pid: int
    started: float
    mark: str = ""
    host: str = ""
    child: subprocess.Popen[bytes] | None = None

    @property
    def reference(self) -> str:
        """``local:<host>:<pid>:<its start>:<mark>``."""
        return f"local:{self.host}:{self.pid}:{self.started!r}:{self.mark}"

    @classmethod
    def of(cls, reference: str) -> LocalProcess:
        """Inverse of :attr:`reference`. Raises ValueError."""
        kind, host, pid, started, mark = reference.split(":")
        if kind != "local":
            raise ValueError(f"{reference!r} is no process of the local executor")
        return cls(int(pid), float(started), mark, host)

    def alive(self) -> bool:
        """Whether the leader runs here; reaps it if it is our child."""
        if self.child is not None:
            return self.child.poll() is None
        return self._here() and is_alive(self.pid, self.started)

    def terminate(self) -> None:
        """SIGTERM to the group: the trainer writes a checkpoint and stops."""
        self._signal_group(signal.SIGTERM)

    def kill(self) -> None:
        """SIGKILL to the group and to every process with the mark, in whatever session."""
        self._signal_group(signal.SIGKILL)
        for _ in range(SWEEPS):
            left = list(marked(self.mark)) if self.mark and self._here() else []
            if not left:
                break
            for process in left:
                with contextlib.suppress(psutil.Error):
                    process.kill()
            psutil.wait_procs(left, timeout=1)
        if self.child is not None:
            self.child.wait()

    def _here(self) -> bool:
        return self.host in ("", socket.gethostname())

    def _signal_group(self, number: int) -> None:
        if self.alive():
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.pid, number)


def training_command(job_id: str, data_dir: Path, start: int, devices: int) -> list[str]:
    """The argument list of a job's process."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(devices)] if devices > 1 else []
    words = ["-m", "training", "run-job", job_id, "--data-dir", str(data_dir), "--attempt", str(start)]
    return [sys.executable, *launcher, *words]


class LocalExecutor:
    """Runs :func:`training_command` (or another command, for tests) at a lower priority, without secrets."""

    def __init__(
        self,
        command: Callable[[str, Path, int, int], Sequence[str]] = training_command,
        device: str | None = None,
        database: str | None = None,
        limits: Limits | None = None,
    ) -> None:
        """``device``: where jobs train; None or "auto" = the best there is. ``database``: URL, told if a server's.

        ``limits``: what a job may write; None = those of the environment.
        """
        self.command, self.device, self.limits = command, device, limits
        self.database = database if database and is_server(database) else None

    def start(self, job_id: str, data_dir: Path, start: int = 1, devices: int = 1) -> LocalProcess:
        """Start the child in its own session; its output is appended to the job's log.txt."""
        folder = job_folder(data_dir, job_id)
        folder.mkdir(parents=True, exist_ok=True)
        mark = f"{job_id}.{start}"
        with (folder / "log.txt").open("ab") as log:
            child = subprocess.Popen(
                list(self.command(job_id, data_dir.resolve(), start, devices)),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                cwd=REPOSITORY,
                env={**child_environment(), **self._told(), MARK: mark},
                start_new_session=True,
            )
        with contextlib.suppress(psutil.Error):
            psutil.Process(child.pid).nice(NICENESS)
        return LocalProcess(child.pid, process_start(child.pid), mark, socket.gethostname(), child)

    def adopt(self, reference: str) -> LocalProcess:
        """The child of an earlier worker; one of another machine counts as ended here."""
        try:
            return LocalProcess.of(reference)
        except ValueError:  # another executor's: nothing that could be ended from here
            return LocalProcess(0, 0.0, host="elsewhere")

    def _told(self) -> dict[str, str]:
        told = {"MOLE_DEVICE": self.device, URL_VARIABLE: self.database}
        limits = self.limits.variables() if self.limits is not None else {}
        return {name: value for name, value in told.items() if value} | limits


def child_environment() -> dict[str, str]:
    """This process's environment without tokens, secrets and passwords, and with an unbuffered log."""
    kept = {name: value for name, value in os.environ.items() if not _SECRET.search(name)}
    return {**kept, "PYTHONUNBUFFERED": "1"}


def own_reference() -> str:
    """This process's, as :class:`LocalExecutor` gives it: a launcher's child is found by its launcher."""
    pid = os.getppid() if int(os.environ.get("WORLD_SIZE", "1")) > 1 else os.getpid()
    return LocalProcess(pid, process_start(pid), os.environ.get(MARK, ""), socket.gethostname()).reference


def marked(mark: str) -> Iterator[psutil.Process]:
    """The living processes that carry a job's mark, this one never."""
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            carries = process.pid != os.getpid() and process.environ().get(MARK) == mark
            if carries and process.status() != psutil.STATUS_ZOMBIE:
                yield process


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
