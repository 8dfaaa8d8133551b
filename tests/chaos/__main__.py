"""``python -m tests.chaos``: kill background jobs in every way there is, and count what is lost."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from .campaign import Campaign
from .findings import summary
from .recipes import make_materials
from .scenarios import SCENARIOS

EPILOG = """
scenarios: alone = one job of each kind without a fault, to compare with; kills = SIGKILL of child and worker at random
moments; checkpoint = the latest one is damaged; disk = full; reboot = process ids of others, another host; database =
locked; app = killed and started again. After each: every job has ended, with a reason if it failed; at most one
checkpoint interval is lost; results equal those of jobs left alone, bit for bit; no process, half file or temporary
folder is left. Exit code: 0 = all of this holds, 1 = not, 2 = the command is wrong.
"""


def parser() -> argparse.ArgumentParser:
    """The options."""
    cli = argparse.ArgumentParser(
        prog="python -m tests.chaos", description=__doc__, epilog=EPILOG, formatter_class=argparse.RawTextHelpFormatter
    )
    cli.add_argument("--kills", type=int, default=50, help="kills at random moments (default 50)")
    cli.add_argument("--seed", type=int, default=0, help="of the random moments (default 0)")
    cli.add_argument("--minutes", type=float, help="no kill after these (default 10, or 18 s for each kill if longer)")
    cli.add_argument("--json", action="store_true", help="figures as JSON on standard output")
    cli.add_argument("--keep", type=Path, metavar="DIR", help="work in this folder and leave it (default: temporary)")
    cli.add_argument("--only", nargs="+", metavar="NAME", choices=list(SCENARIOS), help="these scenarios alone")
    return cli


def main(argv: Sequence[str] | None = None) -> int:
    """Run the campaign; returns 0 if every invariant holds."""
    cli = parser()
    args = cli.parse_args(argv)
    if args.kills < 0 or (args.minutes is not None and args.minutes <= 0):
        cli.error("--kills and --minutes are not negative, and a run needs some time.")
    began = time.monotonic()
    minutes = args.minutes or max(10.0, args.kills * 0.3)
    with contextlib.ExitStack() as stack:
        folder = args.keep
        if folder is None:
            folder = Path(tempfile.mkdtemp(prefix="chaos-"))
            stack.callback(shutil.rmtree, folder, ignore_errors=True)
        folder.mkdir(parents=True, exist_ok=True)
        with contextlib.redirect_stdout(sys.stderr):
            materials = make_materials(folder / "made")
        for kind in materials.missing:
            print(f"ATTENTION: jobs of kind {kind} cannot be built here and are left out.", file=sys.stderr)
        campaign = Campaign(folder, materials, seed=args.seed)
        _abort_on_signals(campaign, stack)
        result = campaign.run(args.only or list(SCENARIOS), args.kills, minutes * 60 - (time.monotonic() - began))
    result["left_out"] = list(materials.missing)
    result["seconds"] = round(time.monotonic() - began, 1)
    print(json.dumps(result, indent=2) if args.json else summary(result))
    return 1 if result["violations"] else 0


def _abort_on_signals(campaign: Campaign, stack: contextlib.ExitStack) -> None:
    """Ctrl+C and SIGTERM leave no process and no temporary folder behind; threads that wait are not waited for."""

    def abort(number: int, frame: object) -> None:
        campaign.abort()
        stack.close()
        os._exit(128 + number)

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, abort)


if __name__ == "__main__":
    sys.exit(main())
