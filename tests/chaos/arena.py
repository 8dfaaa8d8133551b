"""An arena: one data folder with a real worker process, jobs, and waiting for what they say."""

from __future__ import annotations

import random
import shutil
import subprocess
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from training.jobs.store import JobStore, job_folder

from . import invariants, processes
from .findings import Findings, JobReport, Kill
from .recipes import Materials, Recipe

if TYPE_CHECKING:
    from training.jobs.store import Job, JobEvent

ENDED = ("finished", "failed", "cancelled")
WORKER = ("-m", "training", "worker", "--data-dir")
POLL = 0.05
PATIENCE = 600.0  # seconds for one thing to happen on a busy machine
ORPHAN_GRACE = 20.0  # seconds for a process that has written down its end to leave


class Stuck(Exception):
    """Something that had to happen did not."""


class Budget:
    """How many kills may still be done, shared by the arenas of a run, and until when."""

    def __init__(self, kills: int, seconds: float) -> None:
        self.asked, self.ends = kills, time.monotonic() + seconds
        self._left, self._lock = kills, threading.Lock()

    @property
    def undone(self) -> int:
        """Kills that nobody has taken yet."""
        return self._left

    @property
    def left(self) -> int:
        """Those that may still be done; none once the time is over."""
        return self._left if time.monotonic() < self.ends else 0

    def take(self) -> bool:
        """One kill, if there is one left."""
        with self._lock:
            taken = self.left > 0
            self._left -= taken
            return taken

    def give_back(self) -> None:
        """A kill that was taken and not done."""
        with self._lock:
            self._left += 1


@dataclass
class Arena:
    """Where a scenario plays. Use as a context manager: no process of it outlives the block."""

    name: str
    folder: Path
    materials: Materials
    rng: random.Random
    budget: Budget
    command: Sequence[str] = WORKER
    """Arguments of Python that start a worker; the data folder is appended."""
    ready: str = ""
    """What the worker prints once it serves, where that has to be waited for."""
    environment: dict[str, str] = field(default_factory=dict)
    """Variables of the worker, which its children inherit."""
    say: Callable[[str], None] = lambda text: None
    findings: Findings = field(default_factory=Findings)

    def __post_init__(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        self.data = self.folder / "data"
        self.mark = f"{self.folder.resolve()}-{time.time_ns()}"
        self.jobs: dict[str, Recipe] = {}
        self.expected: dict[str, tuple[bool, int]] = {}
        self.stack = ExitStack()
        """What is undone when no process is left."""
        self._worker: subprocess.Popen | None = None
        self._store: JobStore | None = None

    def __enter__(self) -> Arena:
        self.materials.place(self.data)
        return self

    def __exit__(self, *error: object) -> None:
        for process in processes.marked(self.mark):
            processes.kill(process.pid)
        if self._worker is not None:
            self._worker.wait()
        if self._store is not None:
            self._store.close()
        self.stack.close()

    @property
    def store(self) -> JobStore:
        """The data folder's jobs."""
        if self._store is None:
            self._store = JobStore.of(self.data)
        return self._store

    @property
    def kinds(self) -> list[str]:
        """The kinds of jobs there are recipes for."""
        return list(self.materials.recipes)

    # -- the worker --------------------------------------------------------------------------------------------

    def start_worker(self) -> None:
        """Start the worker process, and wait until it is ready where it says so."""
        log = self.folder / "worker.log"
        known = log.stat().st_size if log.is_file() else 0
        command = [*self.command, str(self.data)]
        self._worker = processes.start(command, self.mark, log, self.environment)

        def serves() -> bool:
            return not self.worker_lives or self.ready.encode() in log.read_bytes()[known:]

        if self.ready:
            self.wait(serves, f"{' '.join(self.command)} to start")
        if not self.worker_lives:
            raise Stuck("the worker did not start")

    def kill_worker(self) -> None:
        """SIGKILL, without a word."""
        assert self._worker is not None
        self._worker.kill()
        self._worker.wait()

    def stop_worker(self) -> None:
        """Ask the worker to stop; it must."""
        if self._worker is None:
            return
        self._worker.terminate()
        try:
            self._worker.wait(30)
        except subprocess.TimeoutExpired as error:
            self.kill_worker()
            raise Stuck("the worker did not stop within 30 seconds of SIGTERM") from error
        finally:
            self._worker = None

    @property
    def worker_lives(self) -> bool:
        """Whether the worker process runs."""
        return self._worker is not None and self._worker.poll() is None

    # -- jobs --------------------------------------------------------------------------------------------------

    def add(self, kind: str, *, comparable: bool = True, allowed: int = 1, **changes: object) -> str:
        """Queue a job of this kind's recipe.

        Args:
            comparable: its result must equal that of the same job left alone.
            allowed: how many checkpoint intervals an interruption may cost.
            changes: settings other than the recipe's.
        """
        recipe = self.materials.recipes[kind]
        job = self.store.create(recipe.kind, {**recipe.config, **changes}, title=self.name)
        self.jobs[job], self.expected[job] = recipe, (comparable and not changes, allowed)
        return job

    def events(self, job: str, *types: str, after: int = 0) -> Sequence[JobEvent]:
        """The job's events; all types if none is named."""
        return self.store.events(job, after=after, types=types or None, limit=1_000_000)

    def job_folder(self, job: str) -> Path:
        """The job's files."""
        return job_folder(self.data, job)

    def pid(self, job: str) -> int | None:
        """The job's living process, as its record names it."""
        record = self.store.get(job)
        alive = record.pid is not None and processes.carries(record.pid, self.mark)
        return record.pid if alive and record.state not in ENDED else None

    def kill_child(self, job: str) -> bool:
        """SIGKILL to the job's process; whether there was one."""
        pid = self.pid(job)
        if pid is not None:
            processes.kill(pid)
        return pid is not None

    def struck(self, target: str, phase: str, job: str) -> None:
        """Write a kill down."""
        self.findings.kills.append(Kill(target, phase, job, self.store.get(job).step))

    def wait(self, condition: Callable[[], object], what: str, seconds: float = PATIENCE) -> None:
        """Until ``condition``. Raises Stuck, with what was waited for."""
        end = time.monotonic() + seconds
        while not condition():
            if time.monotonic() > end:
                raise Stuck(f"waited {seconds:.0f} seconds in vain for {what}")
            time.sleep(POLL)

    def wait_steps(self, job: str, count: int, *, start: int = 1) -> None:
        """Until the job's process number ``start`` has reported ``count`` steps."""

        def there() -> bool:
            tries = invariants.attempts(self.events(job))
            return self.ended(job) or (len(tries) >= start and len(tries[-1].steps) >= count)

        self.wait(there, f"{count} steps of start {start} of job {job}")
        record = self.store.get(job)
        if record.state in ENDED:
            raise Stuck(f"job {job} is {record.state} before {count} steps of start {start}: {record.reason}")

    def ended(self, job: str) -> bool:
        """Whether the job has come to an end."""
        return self.store.get(job).state in ENDED

    def finish(self, job: str) -> Job:
        """Wait for the job's end."""
        self.wait(lambda: self.ended(job), f"the end of job {job}")
        return self.store.get(job)

    def retry(self, job: str) -> bool:
        """Queue a failed job again, where the store can; whether it did."""
        retry = getattr(self.store, "retry", None)
        if retry is None:
            self.findings.notes.append("The store cannot retry a failed job: it stays failed.")
            return False
        retry(job)
        return True

    # -- the end -----------------------------------------------------------------------------------------------

    def close(self) -> None:
        """Stop the worker and check every invariant of every job of this arena."""
        check = self.findings.check
        check(self._worker is None or self.worker_lives, "the worker is dead")
        self.stop_worker()
        for job, recipe in self.jobs.items():
            self._check_job(job, recipe)
        for sentence in processes.orphans(self.mark, ORPHAN_GRACE):
            check(False, sentence)
        for sentence in invariants.half_files(self.data):
            check(False, sentence)
        folders, files = invariants.leftovers(self.data)
        check(not folders, f"temporary folders are left: {', '.join(folders)}")
        if files:
            self.findings.notes.append(f"{len(files)} temporary files of killed processes are left, such as {files[0]}")

    def _check_job(self, job: str, recipe: Recipe) -> None:
        check, record = self.findings.check, self.store.get(job)
        comparable, allowed = self.expected[job]
        name = f"{recipe.kind} job {job}"
        check(record.state in ENDED, f"{name} is still {record.state}")
        check(record.state != "failed" or record.reason, f"{name} failed without a reason")
        tries = invariants.attempts(self.events(job))
        for sentence in invariants.lost_work(tries, allowed * recipe.save_every) + invariants.disorder(tries):
            check(False, f"{name}: {sentence}")
        digest = self._digest(record)
        check(record.state != "finished" or digest or not self.materials.folder, f"{name} finished without a file")
        if record.state == "failed":
            self.findings.notes.append(f"{name} failed: {record.reason}")
        resumed = sum(bool(attempt.resumed) for attempt in tries[1:])
        lost = tuple(invariants.losses(tries))
        report = JobReport(job, recipe.kind, record.state, len(tries), resumed, lost, digest, comparable)
        self.findings.jobs.append(report)

    def _digest(self, record: Job) -> str | None:
        """The content of the job's result file, of which a copy is kept beside the data folder."""
        path = (record.result or {}).get("path")
        file = self.data / str(path) if path else None
        if file is None or not file.is_file():
            return None
        kept = self.folder / "results"
        kept.mkdir(exist_ok=True)
        shutil.copy(file, kept / f"{record.kind}-{record.id}{file.suffix}")
        return invariants.content(file)
