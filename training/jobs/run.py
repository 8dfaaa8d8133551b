"""The child process of a job: builds the task from the job's configuration, runs it, writes down how it ended."""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import psutil

from mole_diffusion.errors import InvalidRequest, MoleError
from training.config import parse
from training.control import Commands
from training.events import Event, Failed, Finished, LogLine, Progress, Sample, Saved
from training.loop import Outcome, Schedule, run

from .executor import LocalExecutor
from .kinds import BUILDERS
from .store import Job, JobStore, check_id, job_folder

HEARTBEAT = 5.0  # seconds
POLL = 0.5  # seconds between two looks at the requests in the database
SCHEDULE = {"save_every": 50, "sample_every": 100}  # in steps, unless the job says otherwise


class DatabaseSink:
    """Writes events to the job's record, and log lines to the process's output as well."""

    def __init__(self, store: JobStore, job_id: str, folder: Path) -> None:
        self.store, self.job_id, self.folder = store, job_id, folder

    def emit(self, event: Event) -> None:
        """Record one event; how the job ended is recorded by :func:`run_job`."""
        if isinstance(event, Progress):
            self.store.progress(self.job_id, event.step, event.total, event.loss, event.metrics)
        elif isinstance(event, Saved):
            self.store.checkpointed(self.job_id, event.step)
        elif isinstance(event, Sample):
            data = {"path": self._relative(event.path), "scores": dict(event.scores), "prompt": event.prompt}
            self.store.record(self.job_id, "sample", data, event.step)
        elif isinstance(event, LogLine):
            self.log(event.text)
        elif isinstance(event, Failed):
            self.log(event.reason)
        elif isinstance(event, Finished):
            self.log("Finished.")

    def log(self, text: str) -> None:
        """A line for the page and for log.txt."""
        sys.stdout.write(f"{text}\n")
        sys.stdout.flush()
        self.store.record(self.job_id, "log", {"text": text})

    def _relative(self, path: str) -> str:
        return Path(path).resolve().relative_to(self.folder.resolve()).as_posix()


class DatabaseControl:
    """Commands from the job's record, looked up at most every half second, and from SIGTERM at once."""

    def __init__(self, store: JobStore, job_id: str) -> None:
        self.store, self.job_id = store, job_id
        self.signalled = Commands()
        self._next = 0.0
        self._flags = (False, False, False)

    def should_stop(self) -> bool:
        """Whether the job was cancelled or the process was asked to end."""
        return self.signalled.should_stop() or self._look()[0]

    def take_save(self) -> bool:
        """Take a request for a checkpoint."""
        return self._look()[1] and self._take("save")

    def take_sample(self) -> bool:
        """Take a request for sample pictures."""
        return self._look()[2] and self._take("sample")

    def _look(self) -> tuple[bool, bool, bool]:
        if time.monotonic() >= self._next:
            self._flags = self.store.flags(self.job_id)
            self._next = time.monotonic() + POLL
        return self._flags

    def _take(self, name: str) -> bool:
        self._next = 0.0
        return self.store.take_flag(self.job_id, name)


def run_job(data_dir: Path, job_id: str) -> int:
    """Run a job that the worker has claimed; 0 if it finished or was stopped, 1 if it failed."""
    store = JobStore.of(data_dir)
    job = store.get(check_id(job_id))
    if job.state != "running":
        raise InvalidRequest(f"Job {job_id} is {job.state}; the worker starts jobs, after taking them from the queue.")
    if job.pid not in (None, os.getpid()) and LocalExecutor().adopt(job.pid, job.pid_started or 0.0) is not None:
        raise InvalidRequest(f"Job {job_id} already runs in process {job.pid}.")
    # The worker writes this too, but may be killed before it does: a job without a process would be started again.
    store.set_process(job_id, os.getpid(), psutil.Process().create_time())
    folder = job_folder(data_dir, job_id)
    sink, control = DatabaseSink(store, job_id, folder), DatabaseControl(store, job_id)
    with _Heartbeat(store, job_id), _stop_on_sigterm(control.signalled):
        try:
            outcome = _run(job, data_dir, sink, control)
        except MoleError as error:
            return _fail(store, job_id, str(error))
        except Exception as error:
            _fail(store, job_id, f"Training stopped with {type(error).__name__}: {error}")
            raise
    if outcome.status == "finished":
        store.set_state(job_id, "finished", result=outcome.result)
    else:  # stopped: on request, or because the machine shuts down and the job goes on later
        store.set_state(job_id, "cancelled" if store.flags(job_id)[0] else "queued")
    return 0


def _fail(store: JobStore, job_id: str, reason: str) -> int:
    sys.stderr.write(f"{reason}\n")
    store.set_state(job_id, "failed", reason=reason)
    return 1


def _run(job: Job, data_dir: Path, sink: DatabaseSink, control: DatabaseControl) -> Outcome:
    folder = job_folder(data_dir, job.id)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(job.config, indent=2))
    if job.kind not in BUILDERS:
        raise InvalidRequest(f"Unknown kind of job {job.kind!r}; known are {', '.join(BUILDERS)}.")
    settings = dict(job.config)
    schedule = parse(Schedule, {name: settings.pop(name, default) for name, default in SCHEDULE.items()})
    task, out = BUILDERS[job.kind](settings, data_dir, folder, sink.log)
    outcome = run(task, sink, control, folder / "checkpoints", out=out, schedule=schedule)
    if outcome.status == "finished":
        result = {**outcome.result, "path": out.resolve().relative_to(data_dir.resolve()).as_posix()}
        return replace(outcome, result=result)
    return outcome


@contextmanager
def _stop_on_sigterm(commands: Commands) -> Iterator[None]:
    previous = signal.signal(signal.SIGTERM, lambda number, frame: setattr(commands, "stop", True))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


class _Heartbeat:
    """Beats from a thread, so that a long step or a slow load does not look like death."""

    def __init__(self, store: JobStore, job_id: str) -> None:
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._beat, args=(store, job_id), daemon=True)

    def __enter__(self) -> _Heartbeat:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._ended.set()
        self._thread.join()

    def _beat(self, store: JobStore, job_id: str) -> None:
        while not self._ended.wait(HEARTBEAT):
            store.heartbeat(job_id)
