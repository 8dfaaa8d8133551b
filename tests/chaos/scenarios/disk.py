"""The disk runs full while a job trains: it ends with a reason, and with room again it finishes."""

from __future__ import annotations

import contextlib
import os
import resource
import subprocess
from collections.abc import Iterator
from pathlib import Path

import psutil

from tests.chaos import invariants
from tests.chaos.arena import ENDED, Arena, Stuck

SIZE = 48 * 2**20
LEFT = 32 * 1024  # bytes: a checkpoint does not fit, a record of the database may


def run(arena: Arena) -> None:
    """One job whose data folder is a small tmpfs; without the right to mount, its process may write no long file."""
    is_mount = arena.stack.enter_context(mounted(arena.data))
    arena.findings.notes.append(
        f"a tmpfs of {SIZE >> 20} MiB" if is_mount else "no right to mount: RLIMIT_FSIZE of the job's process instead"
    )
    arena.environment["MOLE_MIN_FREE_MB"] = "0"  # the guard that keeps disks from running full is not there
    arena.materials.place(arena.data)
    arena.start_worker()
    job = arena.add(arena.kinds[0])
    arena.wait_steps(job, 2 * arena.jobs[job].save_every + 1)
    if is_mount:
        _full_disk(arena, job)
    else:
        _short_files(arena, job)
    record = arena.store.get(job)
    if record.state == "failed" and arena.retry(job):
        record = arena.finish(job)
        arena.findings.check(record.state == "finished", f"with room again the job {record.state}: {record.reason}")


def _full_disk(arena: Arena, job: str) -> None:
    filler = arena.data / "filler"
    fill(filler, LEFT)
    step = arena.store.get(job).step
    with contextlib.suppress(Stuck):
        arena.wait(lambda: arena.ended(job), "the end of a job without disk", 60)
    record = arena.store.get(job)
    checkpoints = sorted((arena.job_folder(job) / "checkpoints").glob("step-*"))
    arena.findings.check(checkpoints, "no checkpoint is left after the disk was full")
    arena.findings.check(not list(invariants.half_files(arena.data)), "half files while the disk was full")
    arena.findings.notes.append(f"full at step {step}, then {record.state} at step {record.step}: {record.reason}")
    arena.say(f"disk full: {record.state}, {record.reason}")
    filler.unlink()
    if record.state not in ENDED:
        record = arena.finish(job)
    arena.findings.check(record.state != "failed" or record.reason, "the job failed without a reason")


def _short_files(arena: Arena, job: str) -> None:
    pid = arena.pid(job)
    if pid is not None:
        psutil.Process(pid).rlimit(resource.RLIMIT_FSIZE, (4096, 4096))
    arena.finish(job)


def fill(path: Path, left: int) -> None:
    """Write a file until ``left`` bytes of its disk are free."""
    with path.open("wb", buffering=0) as file:
        while (free := free_bytes(path.parent) - left) > 0:
            try:
                file.write(b"\0" * min(free, 2**20))
            except OSError:
                return


def free_bytes(folder: Path) -> int:
    """Free bytes of the disk that holds ``folder``."""
    facts = os.statvfs(folder)
    return facts.f_bavail * facts.f_frsize


@contextlib.contextmanager
def mounted(folder: Path) -> Iterator[bool]:
    """A small tmpfs at ``folder`` if this may be; whether it is."""
    folder.mkdir(parents=True, exist_ok=True)
    options = ["mount", "-t", "tmpfs", "-o", f"size={SIZE}", "chaos", str(folder)]
    try:
        done = subprocess.run(options, capture_output=True, check=False).returncode == 0
    except OSError:
        done = False
    try:
        yield done
    finally:
        if done:
            subprocess.run(["umount", "--lazy", str(folder)], capture_output=True, check=False)
