"""Another process holds the database for longer than a step takes, then for longer than the busy timeout."""

from __future__ import annotations

import sqlite3
import sys
import time
from contextlib import closing
from pathlib import Path

from tests.chaos import processes
from tests.chaos.arena import ENDED, Arena

SHORT, BEYOND = 3.0, 5.0  # seconds: longer than a step, and more than the busy timeout


def run(arena: Arena) -> None:
    """One job that trains while its database is locked twice: it survives, or ends with a reason."""
    arena.start_worker()
    job = arena.add(arena.kinds[0])
    long = busy_timeout(arena) + BEYOND
    for steps, seconds in ((3, SHORT), (12, long)):
        arena.wait_steps(job, steps)
        before = arena.store.get(job).step
        hold(arena, seconds)
        record = arena.store.get(job)
        arena.say(f"locked for {seconds:.0f} s: step {before} before, {record.step} after, {record.state}")
    record = arena.finish(job)
    arena.findings.check(record.state != "cancelled", "nobody cancelled the job, yet it is")
    arena.findings.notes.append(
        f"after locks of {SHORT:.0f} and {long:.0f} s the job {record.state}"
        + (f": {record.reason}" if record.state == "failed" else f", {len(arena.events(job, 'log'))} log lines")
    )
    if record.state == "failed" and arena.retry(job):
        record = arena.finish(job)
        arena.findings.check(record.state == "finished", f"the retried job {record.state}: {record.reason}")
    arena.findings.check(record.state in ENDED, "the job has not ended")


def busy_timeout(arena: Arena) -> float:
    """Seconds for which a process waits for the database before it gives up."""
    with arena.store.engine.connect() as connection:
        return float(connection.exec_driver_sql("PRAGMA busy_timeout").scalar() or 0) / 1000


def hold(arena: Arena, seconds: float) -> None:
    """Let a process of its own lock the database, and wait until it lets go."""
    log = arena.folder / "locker.log"
    locker = processes.start(
        ["-m", __name__, str(arena.data / "library.db"), str(seconds)], arena.mark, log
    )  # fmt: skip
    arena.findings.check(locker.wait(seconds + 120) == 0, f"the database could not be locked; see {log}")


def main(path: Path, seconds: float) -> int:
    """Hold an exclusive transaction."""
    with closing(sqlite3.connect(path, timeout=60, isolation_level=None)) as database:
        database.execute("BEGIN EXCLUSIVE")
        time.sleep(seconds)
        database.execute("ROLLBACK")
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), float(sys.argv[2])))
