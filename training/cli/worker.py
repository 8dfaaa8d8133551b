"""``worker``: run the queued jobs of a data folder."""

from __future__ import annotations

import argparse
import signal
import sys
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of ``worker``."""
    parser.add_argument("--data-dir", type=Path, required=True)


def main(args: argparse.Namespace) -> int:
    """``worker``: serve a data folder's queue until interrupted; a running job survives."""
    from training.jobs.store import JobStore
    from training.jobs.worker import Worker

    worker = Worker(JobStore.of(args.data_dir), args.data_dir)
    worker.acquire()
    signal.signal(signal.SIGTERM, lambda number, frame: worker.request_stop())
    signal.signal(signal.SIGINT, lambda number, frame: worker.request_stop())
    sys.stderr.write(f"Serving {args.data_dir}.\n")
    worker.serve()
    return 0
