"""``worker``: run the queued jobs of a data folder on one device."""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of ``worker``."""
    parser.add_argument("--data-dir", type=Path, required=True)
    parser.add_argument("--database", help="URL of a server database that several machines share; or MOLE_DATABASE_URL")
    parser.add_argument("--device", help="what this worker serves: cpu, cuda, cuda:1, mps; default the best there is")
    parser.add_argument("--once", action="store_true", help="end when nothing waits any more")
    parser.add_argument("--keep-days", type=float, help="days that samples, logs and checkpoints of ended jobs stay")
    parser.add_argument("--keep-jobs", type=int, help="newest ended jobs of each owner whose folders stay")
    parser.add_argument("--json", action="store_true", help="print how the jobs ended as JSON, at the end")


def main(args: argparse.Namespace) -> int:
    """``worker``: serve the queue until interrupted; a running job survives."""
    from training.jobs.database import URL_VARIABLE, shown
    from training.jobs.executor import LocalExecutor
    from training.jobs.limits import Limits
    from training.jobs.retention import Retention
    from training.jobs.store import JobStore
    from training.jobs.worker import Worker

    store = JobStore.of(args.data_dir, args.database or os.environ.get(URL_VARIABLE))
    device = args.device or os.environ.get("MOLE_DEVICE")
    executor = LocalExecutor(device=device, database=store.url, limits=Limits.of(os.environ))
    retention = Retention(args.keep_days, args.keep_jobs)
    worker = Worker(store, args.data_dir, executor=executor, device=device, retention=retention)
    worker.acquire()
    signal.signal(signal.SIGTERM, lambda number, frame: worker.request_stop())
    signal.signal(signal.SIGINT, lambda number, frame: worker.request_stop())
    sys.stderr.write(f"Serving {args.data_dir} as {worker.name} with {shown(store.url)}.\n")
    worker.serve(once=args.once)
    if args.json:
        sys.stdout.write(json.dumps({"worker": worker.name, "ended": dict(worker.ended)}) + "\n")
    return 0
