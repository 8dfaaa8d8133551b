"""``jobs``: list, show, cancel, pause, resume, retry, save, sample, delete, priority, prune the jobs of a folder."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from training.jobs.store import Job, JobStore

ASKED = {
    "cancel": "stop a job; what it has trained so far stays in its checkpoint",
    "pause": "write a checkpoint, end the process and free its device",
    "resume": "go on with a paused or cancelled job",
    "retry": "go on with a failed job from its last checkpoint",
    "save": "write a checkpoint now",
    "sample": "make sample pictures now",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of ``jobs``."""
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--data-dir", type=Path, required=True)
    common.add_argument("--database", help="URL of a server database; or MOLE_DATABASE_URL")
    common.add_argument("--json", action="store_true", help="print JSON")
    actions = parser.add_subparsers(dest="asked", required=True)
    listed = actions.add_parser("list", parents=[common], help="the newest jobs first")
    listed.add_argument("--state", action="append", help="only jobs in this state; may be given again")
    listed.add_argument("--limit", type=int, default=100, help="default 100")
    for name, words in {"show": "one job in full", **ASKED, "delete": "forget an ended job and its files"}.items():
        actions.add_parser(name, parents=[common], help=words).add_argument("id", help="the job's id")
    priority = actions.add_parser("priority", parents=[common], help="move a waiting job: higher numbers start first")
    priority.add_argument("id", help="the job's id")
    priority.add_argument("priority", type=int)
    pruned = actions.add_parser("prune", parents=[common], help="remove what ended jobs no longer need; results stay")
    pruned.add_argument("--keep-days", type=float, help="days that samples, logs and checkpoints stay")
    pruned.add_argument("--keep-jobs", type=int, help="newest ended jobs of each owner whose folders stay")


def main(args: argparse.Namespace) -> int:
    """``jobs``: one request to the job store."""
    from training.jobs.database import URL_VARIABLE
    from training.jobs.store import JobStore

    store = JobStore.of(args.data_dir, args.database or os.environ.get(URL_VARIABLE))
    try:
        _ANSWERS.get(args.asked, _ask)(store, args)
    finally:
        store.close()
    return 0


def _list(store: JobStore, args: argparse.Namespace) -> None:
    from training.config import check
    from training.jobs.states import STATES

    for state in args.state or []:
        check(state in STATES, f"A job's state is one of {', '.join(STATES)}, not {state!r}.")
    jobs = store.list(args.state, limit=args.limit)
    if args.json:
        _say_json([asdict(job) for job in jobs])
    else:
        _say("\n".join(map(_line, jobs)) or "There are no jobs.")


def _show(store: JobStore, args: argparse.Namespace) -> None:
    _tell(store.get(args.id), args)


def _ask(store: JobStore, args: argparse.Namespace) -> None:
    """One of :data:`ASKED`."""
    from training.jobs.limits import Limits

    if args.asked in ("resume", "retry"):
        getattr(store, args.asked)(args.id, limits=Limits.of(os.environ))
    else:
        getattr(store, f"request_{args.asked}")(args.id)
    _tell(store.get(args.id), args)


def _delete(store: JobStore, args: argparse.Namespace) -> None:
    from training.jobs.retention import remove_folder

    store.delete(args.id)
    remove_folder(args.data_dir, args.id)
    if args.json:
        _say_json({"deleted": args.id})
    else:
        _say(f"Deleted job {args.id}.")


def _priority(store: JobStore, args: argparse.Namespace) -> None:
    store.set_priority(args.id, args.priority)
    _tell(store.get(args.id), args)


def _prune(store: JobStore, args: argparse.Namespace) -> None:
    from training.jobs.retention import Retention, prune

    pruned = prune(store, args.data_dir, Retention(args.keep_days, args.keep_jobs))
    if args.json:
        _say_json(asdict(pruned))
    else:
        _say(f"Removed {pruned.bytes / 2**20:.1f} MB of {pruned.jobs} {'job' if pruned.jobs == 1 else 'jobs'}.")


_ANSWERS: Mapping[str, Callable[[JobStore, argparse.Namespace], None]] = {
    "list": _list,
    "show": _show,
    "delete": _delete,
    "priority": _priority,
    "prune": _prune,
}


def _tell(job: Job, args: argparse.Namespace) -> None:
    if args.json:
        _say_json(asdict(job))
        return
    asked = [name for name in ("cancel", "pause") if job.state == "running" and getattr(job, name)]
    more = [f"asked to {' and '.join(asked)}"] if asked else []
    _say("\n".join([_line(job), *more, *([job.reason] if job.reason else [])]))


def _line(job: Job) -> str:
    when = datetime.fromtimestamp(job.created).strftime("%Y-%m-%d %H:%M")
    return f"{job.id}  {job.state:<9}  {job.kind:<8}  {job.step:>6}/{job.total:<6}  {when}  {job.title}".rstrip()


def _say(text: str) -> None:
    sys.stdout.write(f"{text}\n")


def _say_json(value: Any) -> None:
    _say(json.dumps(value))
