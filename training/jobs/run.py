"""The child process of a job: builds the task from the job's configuration, runs it, writes down how it ended.

Where a job trains on several devices there is one such process for each; the first one writes and is told.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from mole_diffusion.errors import InvalidRequest
from training.config import check, parse
from training.control import Commands, Control
from training.events import Sink, SinkGroup
from training.loop import Outcome, Schedule, run
from training.ranks import Ranks

from .channel import LEASE, Claim, DatabaseControl, DatabaseSink, Heartbeat
from .database import URL_VARIABLE
from .errors import JobLost, StoreUnavailable
from .executor import LocalExecutor, own_reference
from .kinds import BUILDERS
from .limits import DiskGuard, Limits
from .reasons import is_lost_peer, sentence
from .retry import persist
from .states import State
from .store import Job, JobStore, Requests, check_id, job_folder

SCHEDULE = {"save_every": 50, "sample_every": 100}  # in steps, unless the job says otherwise


def run_job(data_dir: Path, job_id: str, start: int | None = None) -> int:
    """Run a job that the worker has claimed; 0 if it finished, was stopped or was taken away, 1 if it failed.

    ``start``: which start of the job this is; a later one makes this process stop. None = the present one.
    The server database's URL, if there is one, is taken from the environment and removed there.
    """
    url = os.environ.pop(URL_VARIABLE, None)
    store = persist(lambda: JobStore.of(data_dir, url), LEASE)
    try:
        job = persist(lambda: store.get(check_id(job_id)), LEASE)
        _check_claimed(job, start)
        if int(os.environ.get("RANK", "0")) > 0:
            return _along(store, job, data_dir)
        return _lead(store, job, data_dir)
    finally:
        store.close()


def _lead(store: JobStore, job: Job, data_dir: Path) -> int:
    claim = Claim(store, job.id, job.starts)
    # The worker writes this too, but may be killed before it does: a job without a process would be started again.
    persist(lambda: store.set_reference(job.id, own_reference(), job.starts), LEASE)
    folder = job_folder(data_dir, job.id)
    folder.mkdir(parents=True, exist_ok=True)
    sink, control = DatabaseSink(claim, folder), DatabaseControl(claim)
    try:
        with _stop_on_sigterm(control.signalled), Heartbeat(claim, control.signalled):
            return _settle(claim, job, lambda: _train(job, data_dir, sink, control, store))
    except JobLost as error:
        sys.stderr.write(f"{error}\n")
        return 0


def _settle(claim: Claim, job: Job, train: Any) -> int:
    """Train and write down how it ended; an end that cannot be written is the worker's to settle."""
    try:
        outcome = train()
    except (JobLost, StoreUnavailable):
        raise
    except Exception as error:
        if is_lost_peer(error):
            raise
        reason = sentence(error, job.config)
        claim.end("failed", reason=reason)
        with suppress(OSError):  # the log may lie on a full disk
            sys.stderr.write(f"{reason}\n")
        if reason.startswith("Training stopped with"):
            raise  # nobody foresaw it: its traceback belongs into the log
        return 1
    if outcome.status == "finished":
        claim.end("finished", result=outcome.result)
    else:
        claim.end(_stopped(persist(claim.requests, LEASE)))
    return 0


def _stopped(asked: Requests) -> State:
    """On request, or because the machine shuts down and the job goes on later."""
    return "cancelled" if asked.cancel else "paused" if asked.pause else "queued"


def _along(store: JobStore, job: Job, data_dir: Path) -> int:
    """One of the other processes of a job on several devices. Why it fails is said, if it is the first to fail."""
    commands = Commands()
    with _stop_on_sigterm(commands):
        try:
            _train(job, data_dir, SinkGroup(), commands, None)
        except Exception as error:
            if is_lost_peer(error):
                raise
            Claim(store, job.id, job.starts).end("failed", reason=sentence(error, job.config))
            raise
    return 0


def _train(job: Job, data_dir: Path, sink: Sink, control: Control, store: JobStore | None) -> Outcome:
    """Build and run the task; with ``store`` (the first process) within the disk's limits."""
    folder = job_folder(data_dir, job.id)
    if isinstance(sink, DatabaseSink) and store is not None:
        others = [job_folder(data_dir, other) for other in store.siblings(job.id)]
        sink.guard = DiskGuard(Limits.of(os.environ), folder, others)
        sink.guard.check()
        unfinished = folder / ".config.json"
        unfinished.write_text(json.dumps(job.config, indent=2))
        os.replace(unfinished, folder / "config.json")
    check(job.kind in BUILDERS, f"Unknown kind of job {job.kind!r}; known are {', '.join(BUILDERS)}.")
    settings = dict(job.config)
    ranks = _ranks(settings.pop("devices", 1))
    schedule = parse(Schedule, {name: settings.pop(name, default) for name, default in SCHEDULE.items()})
    log = sink.log if isinstance(sink, DatabaseSink) else lambda text: None
    task, out = BUILDERS[job.kind](settings, data_dir, folder, log)
    outcome = run(task, sink, control, folder / "checkpoints", out=out, schedule=schedule, ranks=ranks)
    if outcome.status == "finished":
        return replace(outcome, result=_result(outcome.result, out, data_dir))
    return outcome


def _result(result: Mapping[str, Any], out: Path, data_dir: Path) -> dict[str, Any]:
    return {**result, "path": out.resolve().relative_to(data_dir.resolve()).as_posix()}


def _ranks(devices: int) -> Ranks:
    """The processes that train together, each told its device. Raises InvalidRequest where there are too few GPUs."""
    if devices > 1 and os.environ.get("MOLE_DEVICE") != "cpu" and torch.cuda.is_available():
        there = torch.cuda.device_count()
        check(devices <= there, f"The job asks for {devices} GPUs and this machine has {there}; ask for fewer.")
    ranks = Ranks.here()
    if ranks.device is not None:
        os.environ["MOLE_DEVICE"] = ranks.device
    return ranks


def _check_claimed(job: Job, start: int | None) -> None:
    """Raise InvalidRequest, or JobLost, where this process has no business with the job."""
    if job.state != "running":
        raise InvalidRequest(f"Job {job.id} is {job.state}; the worker starts jobs, after taking them from the queue.")
    if start is not None and start != job.starts:
        raise JobLost(f"Job {job.id} was started again meanwhile; start {start} of it ends here.")
    known = job.reference
    if known in (None, own_reference()) or int(os.environ.get("WORLD_SIZE", "1")) > 1:
        return
    process = LocalExecutor().adopt(known)
    if process.pid != os.getpid() and process.alive():
        raise InvalidRequest(f"Job {job.id} already runs in process {process.pid}.")


@contextmanager
def _stop_on_sigterm(commands: Commands) -> Iterator[None]:
    previous = signal.signal(signal.SIGTERM, lambda number, frame: setattr(commands, "stop", True))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)
