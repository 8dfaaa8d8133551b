"""``run-job``: run one claimed job of a data folder; the worker starts this."""

from __future__ import annotations

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of ``run-job``."""
    parser.add_argument("id", help="the job's id")
    parser.add_argument("--data-dir", type=Path, required=True)


def main(args: argparse.Namespace) -> int:
    """``run-job``: what the worker starts."""
    from training.jobs.run import run_job

    return run_job(args.data_dir.resolve(), args.id)
