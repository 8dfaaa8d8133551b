"""A job's process for the worker's tests: counts steps as its configuration says. Starts fast, without torch."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from training.jobs.database import URL_VARIABLE
from training.jobs.errors import JobLost
from training.jobs.store import JobStore, job_folder


def main(job_id: str, data_dir: Path, start: int) -> int:
    store = JobStore.of(data_dir, os.environ.get(URL_VARIABLE))
    try:
        return work(store, job_id, data_dir, start)
    except JobLost:
        print("taken away", flush=True)
        return 0


def work(store: JobStore, job_id: str, data_dir: Path, start: int) -> int:
    job = store.get(job_id)
    folder = job_folder(data_dir, job_id)
    stopped: list[int] = []
    if not job.config.get("deaf"):
        signal.signal(signal.SIGTERM, lambda number, frame: stopped.append(number))
    else:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    (folder / "environment.txt").write_text("\n".join(os.environ))
    if "grandchild" in job.config:  # in the same session, or in one of its own
        own = job.config["grandchild"] == "own session"
        grandchild = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=own)
        (folder / "grandchild").write_text(str(grandchild.pid))
    done_file = folder / "done"
    done = int(done_file.read_text()) if done_file.exists() else 0
    print(f"started at {done}")
    for step in range(done + 1, job.config["steps"] + 1):
        if stopped:
            asked = store.requests(job_id, start)
            store.set_state(job_id, "cancelled" if asked.cancel else "paused" if asked.pause else "queued", start=start)
            return 0
        time.sleep(job.config.get("pause", 0.01))
        store.progress(job_id, step, job.config["steps"], 1.0 / step, {}, start)
        if job.config.get("checkpoints"):
            (folder / "writing").write_text(str(step))
            os.replace(folder / "writing", done_file)  # as real checkpoints: whole or not at all
            store.checkpointed(job_id, step, start)
        if step == job.config.get("die_at"):
            print("out of memory, said the machine", flush=True)
            os.kill(os.getpid(), signal.SIGKILL)
    store.set_state(job_id, "finished", result={"steps": job.config["steps"]}, start=start)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])))
