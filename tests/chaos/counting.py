"""A worker and a child that only count: they start in a second, so that the harness itself can be tested.

``python -m tests.chaos.counting worker DIR`` serves a data folder; it starts ``… child DIR ID`` for each job.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from training.jobs.executor import LocalExecutor
from training.jobs.store import JobStore, job_folder
from training.jobs.worker import Timing, Worker

from .recipes import Materials, Recipe

COMMAND = ("-m", "tests.chaos.counting", "worker")
STEPS, SAVE_EVERY, PAUSE = 40, 2, 0.03


def recipes(**faults: object) -> Materials:
    """One kind of job. ``forgets``: steps that are lost on a resume; ``leaves``: seconds of a process left behind."""
    return Materials({"count": Recipe("count", {"steps": STEPS, **faults}, SAVE_EVERY)})


def command(job: str, data: Path, *_: int) -> list[str]:
    """What the worker starts."""
    return [sys.executable, "-m", "tests.chaos.counting", "child", str(data), job]


def work(data: Path) -> int:
    """The real worker, with another child."""
    worker = Worker(JobStore.of(data), data, executor=LocalExecutor(command), timing=Timing(poll=0.05, term_grace=1))
    worker.acquire()
    signal.signal(signal.SIGTERM, lambda number, frame: worker.request_stop())
    worker.serve()
    return 0


def count(data: Path, job: str) -> int:
    """Count to the job's last step, with a checkpoint every other step; the result says what was counted."""
    store, folder = JobStore.of(data), job_folder(data, job)
    config = store.get(job).config
    kept = folder / "kept.json"
    done = json.loads(kept.read_text()) if kept.is_file() else []
    del done[max(len(done) - int(config.get("forgets", 0)), 0) :]
    if config.get("leaves"):
        subprocess.Popen(["sleep", str(config["leaves"])], start_new_session=True, env={"MOLE_CHAOS_MARK": _mark()})
    for step in range(len(done) + 1, config["steps"] + 1):
        time.sleep(PAUSE)
        done.append(step)
        store.progress(job, step, config["steps"], 1.0 / step, {})
        if step % SAVE_EVERY == 0:
            write(kept, done)
            store.checkpointed(job, step)
    result = folder / "result.json"
    write(result, done)
    store.set_state(job, "finished", result={"path": result.relative_to(data).as_posix()})
    return 0


def write(path: Path, values: list[int]) -> None:
    """Whole or not at all."""
    unfinished = path.with_name(f".{path.name}")
    unfinished.write_text(json.dumps(values))
    os.replace(unfinished, path)


def _mark() -> str:
    return os.environ["MOLE_CHAOS_MARK"]


if __name__ == "__main__":
    role, folder, *rest = sys.argv[1:]
    sys.exit(work(Path(folder)) if role == "worker" else count(Path(folder), *rest))
