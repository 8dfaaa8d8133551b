"""The worker: serves the queue on one device, one job at a time, and survives restarts of itself and of its children.

Several workers share a store: one for every device of a machine, and on several machines that share the data folder and
a server database. A worker takes care of the jobs that it took, and of those whose lease has passed.
"""

from __future__ import annotations

import logging
import re
import socket
import threading
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock, Timeout

from mole_diffusion.errors import InvalidRequest

from .errors import JobLost
from .executor import Executor, LocalExecutor, Process
from .reasons import died
from .retention import KEEP_ALL, Retention, prune
from .retry import is_transient
from .states import State
from .store import Job, JobStore, job_folder

logger = logging.getLogger(__name__)
MAX_ATTEMPTS = 2  # starts without a checkpoint in between before a dying job counts as failed
BEAT = 5.0  # seconds between two heartbeats of a job whose process lives
PRUNE_EVERY = 3600.0  # seconds between two rounds of removing what is too old


@dataclass(frozen=True)
class Timing:
    """Waiting times in seconds."""

    poll: float = 0.5
    """Between two looks at the queue and the child."""
    term_grace: float = 20.0
    """From SIGTERM to SIGKILL after a cancel request: time to write a checkpoint."""
    pause_grace: float = 120.0
    """The same after a request to pause: the device is less urgent than the work."""
    lease: float = 60.0
    """Another worker's running job is taken over when its heartbeat has stood still for so long."""


@dataclass
class Current:
    """The job that this worker runs, in which of its starts, and since when its process has been asked to end."""

    job: str
    start: int
    process: Process
    terminated: float | None = None
    beaten: float = 0.0


class Worker:
    """Starts queued jobs in child processes. Use :meth:`start` and :meth:`stop` for a thread, or :meth:`serve`.

    Stopping the worker leaves a running child alone: the next worker of this machine and device adopts it.
    """

    def __init__(
        self,
        store: JobStore,
        data_dir: Path,
        *,
        executor: Executor | None = None,
        timing: Timing = Timing(),
        device: str | None = None,
        retention: Retention = KEEP_ALL,
    ) -> None:
        """``device``: what it serves, such as "cuda:1"; one with a number takes only jobs that train on one device."""
        data_dir.mkdir(parents=True, exist_ok=True)
        self.store, self.data_dir, self.timing, self.retention = store, data_dir, timing, retention
        self.executor = executor if executor is not None else LocalExecutor(device=device, database=store.url)
        self.device = device or getattr(self.executor, "device", None) or "auto"
        self.name = f"{socket.gethostname()}/{self.device}"
        self.ended: Counter[State] = Counter()
        self._devices = 1 if ":" in self.device else None
        lock = re.sub(r"[^\w.-]+", "-", f"worker-{self.name}.lock")
        self._lock = FileLock(str(data_dir / lock), timeout=0, thread_local=False)
        self._leases = Leases(timing.lease)
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self._current: Current | None = None
        self._pruned = float("-inf")
        self._idle = False

    def acquire(self) -> None:
        """Become this machine's only worker of the folder and device. Raises InvalidRequest if there is one already."""
        try:
            self._lock.acquire()
        except Timeout as error:
            raise InvalidRequest(
                f"Another worker already serves {self.data_dir} on the device {self.device}; stop it first, "
                "or name another device."
            ) from error

    def start(self) -> None:
        """Serve in a background thread; where another worker serves the device, wait in reserve for its end."""
        if self._thread is None or not self._thread.is_alive():
            self._stop.clear()
            self._thread = threading.Thread(target=self._background, name="mole-worker", daemon=True)
            self._thread.start()

    def stop(self) -> None:
        """Stop serving and free the device. A running child goes on."""
        self.request_stop()
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def request_stop(self) -> None:
        """Stop serving after the current round; returns at once."""
        self._stop.set()

    def serve(self, once: bool = False) -> None:
        """Serve until :meth:`stop`, or only until nothing waits; the lock must be held (see :meth:`acquire`)."""
        try:
            while not self._stop.is_set():
                self._guarded_tick()
                if once and self._idle:
                    return
                self._stop.wait(self.timing.poll)
        finally:
            self._lock.release()

    def tick(self) -> None:
        """One look at the child and the queue."""
        self._idle = False
        if self._current is None:
            self._recover()
        if self._current is None:
            self._prune()
            self._idle = not self._start_next()
        if self._current is not None:
            self._watch(self._current)

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
        except Exception as error:
            self._leases.forget()  # while the store was away nobody could beat
            if is_transient(error):
                logger.warning("The job database does not answer; the worker tries again. (%s)", type(error).__name__)
            else:
                logger.exception("The worker could not finish a round and tries again.")

    def _start_next(self) -> bool:
        """Whether there was a job to start."""
        job = self.store.claim(self.name, self._devices)
        if job is None:
            return False
        try:
            process = self.executor.start(job.id, self.data_dir, job.starts, job.devices)
        except OSError as error:
            reason = f"The training process could not be started: {error}."
            self.store.set_state(job.id, "failed", reason=reason, start=job.starts)
            self.ended["failed"] += 1
            return True
        self._current = Current(job.id, job.starts, process)  # before the store is asked: it may be away by now
        self._note_reference(self._current)
        return True

    def _note_reference(self, current: Current) -> None:
        try:
            self.store.set_reference(current.job, current.process.reference, current.start)
        except JobLost:  # so short a job that it has ended already
            logger.debug("Job %s ended before its process was written down.", current.job)

    def _recover(self) -> None:
        """Jobs that an earlier worker left running: adopt the living, settle the dead."""
        for job in self.store.list(["running"], limit=None):
            if not self._mine(job):
                continue
            process = self.executor.adopt(job.reference) if job.reference is not None else None
            if process is not None and process.alive():
                if self._current is None:
                    self._current = Current(job.id, job.starts, process)
                continue
            if process is not None:
                process.kill()
            self._settle(job.id, job.starts)

    def _mine(self, job: Job) -> bool:
        if job.worker is None:  # taken by an older version, which knew one worker a machine
            return job.host in (None, socket.gethostname()) or self._leases.passed(job)
        return job.worker == self.name or self._leases.passed(job)

    def _watch(self, current: Current) -> None:
        if not current.process.alive():
            current.process.kill()  # what it has started may live on, and hold the device
            self._settle(current.job, current.start)
            self._current = None
            return
        job = self._known(current.job)
        if job is None:  # it has ended and was removed
            self._end(current, self.timing.term_grace, ask=False)
        elif job.starts != current.start:  # it runs elsewhere
            self._end(current, self.timing.term_grace)
        elif job.state != "running":  # it has said how it ended, and is about to leave by itself
            self._end(current, self.timing.term_grace, ask=False)
        elif job.cancel or job.pause:
            self._end(current, self.timing.term_grace if job.cancel else self.timing.pause_grace)
        elif time.monotonic() - current.beaten > BEAT:
            self._beat(current)

    def _known(self, job_id: str) -> Job | None:
        """The job; None where its owner has removed it."""
        try:
            return self.store.get(job_id)
        except InvalidRequest:
            return None

    def _beat(self, current: Current) -> None:
        """A process that takes long to start has no heartbeat of its own yet."""
        try:
            self.store.heartbeat(current.job, current.start)
        except JobLost:  # it ended a moment ago: seen in the next round
            return
        current.beaten = time.monotonic()

    def _end(self, current: Current, grace: float, *, ask: bool = True) -> None:
        if current.terminated is None:
            if ask:
                current.process.terminate()
            current.terminated = time.monotonic()
        elif time.monotonic() - current.terminated > grace:
            current.process.kill()

    def _settle(self, job_id: str, start: int) -> None:
        """The process is gone: if it did not say how the job ended, decide. Another worker may be faster."""
        job = self._known(job_id)
        if job is None:
            return
        if job.state == "running" and job.starts == start:
            state, reason = self._verdict(job)
            try:
                self.store.set_state(job_id, state, reason=reason, start=start)
            except JobLost:
                return
            if state == "queued":
                self.store.record(job_id, "log", {"text": "The training process died; the job starts again."})
            state = self._known(job_id)
            job = job if state is None else state
        self.ended[job.state] += 1
        self._pruned = float("-inf")

    def _verdict(self, job: Job) -> tuple[State, str | None]:
        if job.cancel:
            return "cancelled", None
        if job.pause:
            return "paused", None
        if job.attempts < MAX_ATTEMPTS:
            return "queued", None
        return "failed", died(job.config, last_line(job_folder(self.data_dir, job.id) / "log.txt"))

    def _prune(self) -> None:
        if time.monotonic() - self._pruned > PRUNE_EVERY:
            self._pruned = time.monotonic()
            try:
                prune(self.store, self.data_dir, self.retention)
            except OSError:  # the queue must not wait for files that cannot be removed
                logger.exception("Files of ended jobs could not be removed; a later round tries again.")


class Leases:
    """Which heartbeats stand still, by this machine's own clock: those of two machines may differ."""

    def __init__(self, lease: float) -> None:
        self.lease = lease
        self._seen: dict[tuple[str, int], tuple[float | None, float]] = {}

    def passed(self, job: Job) -> bool:
        """Whether the job's heartbeat has been the same for the length of a lease."""
        key, now = (job.id, job.starts), time.monotonic()
        heartbeat, since = self._seen.get(key, (None, now))
        if key not in self._seen or heartbeat != job.heartbeat:
            self._seen[key] = (job.heartbeat, now)
            return False
        return now - since > self.lease

    def forget(self) -> None:
        """Begin to look anew."""
        self._seen.clear()


def last_line(log: Path, limit: int = 500) -> str:
    """The last line of a log that is not empty, or "(nothing)"."""
    if not log.is_file():
        return "(nothing)"
    with log.open("rb") as file:
        file.seek(max(log.stat().st_size - 8192, 0))
        lines = [line.strip() for line in file.read().decode("utf-8", "replace").splitlines()]
    return next((line[-limit:] for line in reversed(lines) if line), "(nothing)")
