"""The two ends of a job's process: events into the store, requests out of it. Both outlive a store that is away.

Progress may be dropped, for a later step says more; log lines, samples and checkpoints wait a little; how the job ended
waits for as long as a lease lasts.
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from training.control import Commands
from training.events import Event, Failed, Finished, LogLine, Progress, Sample, Saved

from .errors import JobLost, StoreUnavailable
from .limits import DiskGuard
from .retry import is_transient, persist
from .states import State
from .store import JobStore, Requests

HEARTBEAT = 5.0  # seconds
POLL = 0.5  # seconds between two looks at the requests in the database
PATIENCE = 20.0  # seconds that an event waits for the store
LEASE = 60.0  # seconds that the end of a job waits for the store: as long as its worker waits for a heartbeat
NOTHING = Requests(False, False, False, False)


class Claim:
    """A running job in the hands of one start; its writes raise JobLost once the job is no longer this start's."""

    def __init__(self, store: JobStore, job_id: str, start: int, patience: float = PATIENCE) -> None:
        self.store, self.job_id, self.start, self.patience = store, job_id, start, patience
        self.lost = threading.Event()
        self._quiet_until = 0.0

    def progress(self, event: Progress) -> None:
        """Record a step, unless the store is away; then steps are dropped for a few seconds."""
        if time.monotonic() < self._quiet_until:
            return
        given = (event.step, event.total, event.loss, event.metrics)
        try:
            self._own(lambda: self.store.progress(self.job_id, *given, start=self.start))
        except Exception as error:
            if not is_transient(error):
                raise
            self._quiet_until = time.monotonic() + HEARTBEAT

    def checkpointed(self, step: int) -> None:
        """Record a checkpoint."""
        self._patient(lambda: self.store.checkpointed(self.job_id, step, self.start))

    def record(self, kind: str, data: Mapping[str, Any], step: int | None = None) -> None:
        """Record a log line or a sample."""
        self._patient(lambda: self.store.record(self.job_id, kind, data, step, self.start))

    def end(self, state: State, *, reason: str | None = None, result: Mapping[str, Any] | None = None) -> None:
        """Say how this start ended. Raises StoreUnavailable where the store stays away for the length of a lease."""
        write = self.store.set_state
        self._own(
            lambda: persist(lambda: write(self.job_id, state, reason=reason, result=result, start=self.start), LEASE)
        )

    def beat(self) -> None:
        """Say that this process lives."""
        self._own(lambda: self.store.heartbeat(self.job_id, self.start))

    def requests(self) -> Requests:
        """What is asked of the job."""
        return self._own(lambda: self.store.requests(self.job_id, self.start))

    def take(self, name: str) -> bool:
        """Read and clear a request."""
        return self._own(lambda: self.store.take(self.job_id, name, self.start))

    def _patient(self, write: Callable[[], None]) -> None:
        try:
            self._own(lambda: persist(write, self.patience))
        except StoreUnavailable as error:  # the job's own log has it all the same
            sys.stderr.write(f"{error} An event was dropped.\n")

    def _own(self, action: Callable[[], Any]) -> Any:
        if self.lost.is_set():
            raise JobLost(f"Job {self.job_id} was taken from this process.")
        try:
            return action()
        except JobLost:
            self.lost.set()
            raise


class DatabaseSink:
    """Writes events to the job's record, and log lines to the process's output as well."""

    def __init__(self, claim: Claim, folder: Path, guard: DiskGuard | None = None) -> None:
        """``guard``: asked after every checkpoint, raises where the disk's limits are reached."""
        self.claim, self.folder, self.guard = claim, folder, guard

    def emit(self, event: Event) -> None:
        """Record one event; how the job ended is recorded by :func:`training.jobs.run.run_job`."""
        if isinstance(event, Progress):
            self.claim.progress(event)
        elif isinstance(event, Saved):
            self.claim.checkpointed(event.step)
            if self.guard is not None:
                self.guard.check()
        elif isinstance(event, Sample):
            data = {
                "path": self._relative(event.path),
                "prompt": event.prompt,
                "scores": dict(event.scores),
                "identity": dict(event.identity),
                "scorers": list(event.scorers),
            }
            self.claim.record("sample", data, event.step)
        elif isinstance(event, LogLine):
            self.log(event.text)
        elif isinstance(event, Failed) and not self.claim.lost.is_set():
            self.log(event.reason)
        elif isinstance(event, Finished):
            self.log("Finished.")

    def log(self, text: str) -> None:
        """A line for the page and for log.txt."""
        sys.stdout.write(f"{text}\n")
        sys.stdout.flush()
        self.claim.record("log", {"text": text})

    def _relative(self, path: str) -> str:
        return Path(path).resolve().relative_to(self.folder.resolve()).as_posix()


class DatabaseControl:
    """Commands from the job's record, looked up at most every half second, and from SIGTERM at once.

    Raises JobLost between two steps where the job is no longer this process's: it writes no further checkpoint.
    """

    def __init__(self, claim: Claim) -> None:
        self.claim = claim
        self.signalled = Commands()
        self._next = 0.0
        self._known = NOTHING

    def should_stop(self) -> bool:
        """Whether the job was cancelled, or the process asked to end."""
        return self._look().cancel or self.signalled.should_stop()

    def should_pause(self) -> bool:
        """Whether the job is to write a checkpoint and free its device."""
        return self._look().pause

    def take_save(self) -> bool:
        """Take a request for a checkpoint."""
        return self._look().save and self._take("save")

    def take_sample(self) -> bool:
        """Take a request for sample pictures."""
        return self._look().sample and self._take("sample")

    def _look(self) -> Requests:
        if self.claim.lost.is_set() or time.monotonic() >= self._next:
            self._next = time.monotonic() + POLL
            self._known = self._unless_away(self.claim.requests, self._known)
        return self._known

    def _take(self, name: str) -> bool:
        self._next = 0.0
        return self._unless_away(lambda: self.claim.take(name), False)

    def _unless_away(self, action: Callable[[], Any], otherwise: Any) -> Any:
        try:
            return action()
        except Exception as error:
            if not is_transient(error):
                raise
            self._next = time.monotonic() + HEARTBEAT  # asked again later; training goes on meanwhile
            return otherwise


class Heartbeat:
    """Beats from a thread, so that a long step or a slow load does not look like death.

    Where no beat has reached the store for the length of a lease, or the job was taken away, training is told to stop.
    """

    def __init__(self, claim: Claim, commands: Commands, every: float = HEARTBEAT, lease: float = LEASE) -> None:
        self.claim, self.commands, self.every, self.lease = claim, commands, every, lease
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="mole-heartbeat", daemon=True)

    def __enter__(self) -> Heartbeat:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._ended.set()
        self._thread.join()

    def _run(self) -> None:
        last = time.monotonic()
        while not self._ended.wait(self.every):
            try:
                self.claim.beat()
                last = time.monotonic()
            except JobLost:
                self.commands.stop = True
                return
            except Exception as error:
                if not is_transient(error):
                    raise
                if time.monotonic() - last > self.lease:
                    self.commands.stop = True
