"""The machine restarts: everything is dead, and recorded process ids belong to others, or to another host."""

from __future__ import annotations

import os
import socket
import sqlite3
import time
from contextlib import closing

import psutil

from tests.chaos.arena import Arena


def run(arena: Arena) -> None:
    """One job, two reboots: its pid now is this process's; then its record names another host, long silent."""
    arena.start_worker()
    job = arena.add(arena.kinds[-1])
    ours = psutil.Process().create_time() - 1000  # this process lives, but started at another time
    own = {"reference": f"local:{socket.gethostname()}:{os.getpid()}:{ours!r}:"}
    process = f"local:elsewhere:{os.getpid()}:{psutil.Process().create_time()!r}:"
    silent = {"host": "elsewhere", "worker": "elsewhere/auto", "heartbeat": time.time() - 3600}
    elsewhere = {**silent, "reference": process}
    for number, values in enumerate((own, elsewhere), 1):
        arena.wait_steps(job, arena.jobs[job].save_every + 2, start=number)
        arena.kill_worker()
        arena.kill_child(job)
        arena.struck("both", "step", job)
        rewrite(arena, job, **values)
        arena.start_worker()
        arena.wait_steps(job, 1, start=number + 1)
        arena.say(f"taken up again with {', '.join(values)} of another")
    record = arena.finish(job)
    arena.findings.check(record.state == "finished", f"the job {record.state}: {record.reason}")


def rewrite(arena: Arena, job: str, **values: object) -> None:
    """Change the job's record behind everybody's back."""
    columns = ", ".join(f"{name} = ?" for name in values)
    with closing(sqlite3.connect(arena.data / "library.db", timeout=10)) as database, database:
        changed = database.execute(f"UPDATE jobs SET {columns} WHERE id = ?", (*values.values(), job)).rowcount
    arena.findings.check(changed == 1, "the job's record could not be rewritten")
