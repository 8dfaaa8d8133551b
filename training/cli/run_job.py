"""``run-job``: run one claimed job of a data folder; the worker starts this."""

from __future__ import annotations

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of ``run-job``."""
    parser.add_argument("id", help="the job's id")
    parser.add_argument("--data-dir", type=Path, required=True)
    # Not "--start": torch's launcher takes that for an abbreviation of an option of its own.
    parser.add_argument("--attempt", type=int, help="which start of the job this is; default the present one")


def main(args: argparse.Namespace) -> int:
    """``run-job``: what the worker starts. A server database is named by MOLE_DATABASE_URL."""
    from training.jobs.run import run_job

    return run_job(args.data_dir.resolve(), args.id, args.attempt)
