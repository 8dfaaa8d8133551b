"""A job's process for the worker's tests: counts steps as its configuration says. Starts fast, without torch."""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

from training.jobs.store import JobStore, job_folder


def main(job_id: str, data_dir: Path) -> int:
    store = JobStore.of(data_dir)
    job = store.get(job_id)
    folder = job_folder(data_dir, job_id)
    stopped: list[int] = []
    if not job.config.get("deaf"):
        signal.signal(signal.SIGTERM, lambda number, frame: stopped.append(number))
    else:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    (folder / "environment.txt").write_text("\n".join(os.environ))
    done_file = folder / "done"
    done = int(done_file.read_text()) if done_file.exists() else 0
    print(f"started at {done}")
    for step in range(done + 1, job.config["steps"] + 1):
        if stopped:
            store.set_state(job_id, "cancelled" if store.flags(job_id)[0] else "queued")
            return 0
        time.sleep(job.config.get("pause", 0.01))
        store.progress(job_id, step, job.config["steps"], 1.0 / step, {})
        if job.config.get("checkpoints"):
            (folder / "writing").write_text(str(step))
            os.replace(folder / "writing", done_file)  # as real checkpoints: whole or not at all
            store.checkpointed(job_id, step)
        if step == job.config.get("die_at"):
            print("out of memory, said the machine", flush=True)
            os.kill(os.getpid(), signal.SIGKILL)
    store.set_state(job_id, "finished", result={"steps": job.config["steps"]})
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], Path(sys.argv[2])))
