"""``python -m training``: subject, gate, router, base, study and jobs. Exit code 2 and one sentence on bad input."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from mole_diffusion.errors import MoleError
from training.cli import gate, jobs, router, run_job, study, subject, worker

COMMANDS = {
    "subject": subject,
    "gate": gate,
    "router": router,
    "study": study,
    "jobs": jobs,
    "worker": worker,
    "run-job": run_job,
}


def build_parser(chosen: str | None) -> argparse.ArgumentParser:
    """The parser; the options of ``base`` are imported only where that command was ``chosen``."""
    parser = argparse.ArgumentParser(prog="python -m training", description="Train experts, gates and the demo base.")
    subparsers = parser.add_subparsers(dest="command", required=True)
    for name, module in COMMANDS.items():
        summary = (module.__doc__ or "").partition(": ")[2].strip()
        subparser = subparsers.add_parser(name, help=summary.rstrip("."), description=summary.capitalize())
        module.add_arguments(subparser)
        subparser.set_defaults(action=module.main)
    base = subparsers.add_parser("base", help="the demo world's base model and scorer, from their pictures")
    if chosen == "base":
        from training.base import cli

        cli.add_arguments(base)
        base.set_defaults(action=cli.main)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and give its exit code."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    args = build_parser(words[0] if words else None).parse_args(words)
    try:
        return args.action(args)
    except MoleError as error:
        print(error, file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
