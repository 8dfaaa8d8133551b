"""The worker: serves one data folder, one job at a time, and survives restarts of itself and of its children."""

from __future__ import annotations

import logging
import socket
import threading
import time
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock, Timeout

from mole_diffusion.errors import InvalidRequest

from .executor import Executor, LocalExecutor, Process
from .store import Job, JobStore, job_folder

logger = logging.getLogger(__name__)
MAX_ATTEMPTS = 2  # starts without a checkpoint in between before a dying job counts as failed


@dataclass(frozen=True)
class Timing:
    """Waiting times in seconds."""

    poll: float = 0.5
    """Between two looks at the queue and the child."""
    term_grace: float = 20.0
    """From SIGTERM to SIGKILL after a cancel request: time to write a checkpoint."""
    lease: float = 60.0
    """A running job of another host is taken over when its last heartbeat is older than this."""


class Worker:
    """Starts queued jobs in child processes. Use :meth:`start` and :meth:`stop` for a thread, or :meth:`serve`.

    Stopping the worker leaves a running child alone: the next worker adopts it.
    """

    def __init__(
        self, store: JobStore, data_dir: Path, *, executor: Executor | None = None, timing: Timing = Timing()
    ) -> None:
        data_dir.mkdir(parents=True, exist_ok=True)
        self.store, self.data_dir, self.timing = store, data_dir, timing
        self.executor = executor if executor is not None else LocalExecutor()
        self._lock = FileLock(str(data_dir / "worker.lock"), timeout=0, thread_local=False)
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self._current: tuple[str, Process] | None = None
        self._terminated: float | None = None

    def acquire(self) -> None:
        """Become the only worker of the data folder. Raises InvalidRequest if there is one already."""
        try:
            self._lock.acquire()
        except Timeout as error:
            raise InvalidRequest(f"Another worker already serves {self.data_dir}; stop it first.") from error

    def start(self) -> None:
        """Serve in a background thread; where another worker serves the folder, wait in reserve for its end."""
        if self._thread is None or not self._thread.is_alive():
            self._stop.clear()
            self._thread = threading.Thread(target=self._background, name="mole-worker", daemon=True)
            self._thread.start()

    def stop(self) -> None:
        """Stop serving and free the folder. A running child goes on."""
        self.request_stop()
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def request_stop(self) -> None:
        """Stop serving after the current round; returns at once."""
        self._stop.set()

    def serve(self) -> None:
        """Serve until :meth:`stop`; the lock must be held (see :meth:`acquire`)."""
        try:
            while not self._stop.is_set():
                self._guarded_tick()
                self._stop.wait(self.timing.poll)
        finally:
            self._lock.release()

    def tick(self) -> None:
        """One look at the child and the queue."""
        if self._current is None:
            self._recover()
        if self._current is None:
            self._start_next()
        if self._current is not None:
            self._watch(*self._current)

    def _background(self) -> None:
        while not self._stop.is_set():
            try:
                self.acquire()
            except InvalidRequest:
                self._stop.wait(self.timing.poll)
                continue
            self.serve()

    def _guarded_tick(self) -> None:
        try:
            self.tick()
        except Exception:
            logger.exception("The worker could not finish a round and tries again.")

    def _start_next(self) -> None:
        job = self.store.claim()
        if job is None:
            return
        try:
            process = self.executor.start(job.id, self.data_dir)
        except OSError as error:
            self.store.set_state(job.id, "failed", reason=f"The training process could not be started: {error}.")
            return
        self.store.set_process(job.id, process.pid, process.started)
        self._current, self._terminated = (job.id, process), None

    def _recover(self) -> None:
        """Jobs that an earlier worker left running: adopt the living, settle the dead."""
        for job in self.store.list(["running"]):
            if not self._mine(job):
                continue
            process = self.executor.adopt(job.pid, job.pid_started or 0.0) if job.pid is not None else None
            if process is None:
                self._settle(job.id)
            elif self._current is None:
                self._current, self._terminated = (job.id, process), None

    def _mine(self, job: Job) -> bool:
        expired = time.time() - (job.heartbeat or 0.0) > self.timing.lease
        return job.host in (None, socket.gethostname()) or expired

    def _watch(self, job_id: str, process: Process) -> None:
        if not process.alive():
            self._current = None
            self._settle(job_id)
            return
        job = self.store.get(job_id)
        if job.cancel or job.state != "running":  # it was told to stop, or it has said how it ended
            self._end(process)

    def _end(self, process: Process) -> None:
        if self._terminated is None:
            process.terminate()
            self._terminated = time.monotonic()
        elif time.monotonic() - self._terminated > self.timing.term_grace:
            process.kill()

    def _settle(self, job_id: str) -> None:
        """The process is gone: if it did not say how the job ended, decide."""
        job = self.store.get(job_id)
        if job.state != "running":
            return
        if job.cancel:
            self.store.set_state(job_id, "cancelled")
        elif job.attempts < MAX_ATTEMPTS:
            self.store.record(job_id, "log", {"text": "The training process died; the job starts again."})
            self.store.set_state(job_id, "queued")
        else:
            reason = last_line(job_folder(self.data_dir, job_id) / "log.txt")
            self.store.set_state(job_id, "failed", reason=f"The training process died. Its last words: {reason}")


def last_line(log: Path, limit: int = 500) -> str:
    """The last line of a log that is not empty, or "(nothing)"."""
    if not log.is_file():
        return "(nothing)"
    with log.open("rb") as file:
        file.seek(max(log.stat().st_size - 8192, 0))
        lines = [line.strip() for line in file.read().decode("utf-8", "replace").splitlines()]
    return next((line[-limit:] for line in reversed(lines) if line), "(nothing)")
