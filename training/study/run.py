"""``python -m training study``: work on what is missing, then write ``table.md``.

Every part keeps one JSON file per result, so a study that is stopped goes on where it was.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

import torch

from mole_diffusion.bases import assets_dir
from training.study import adapters, extra, objectives, pairs, pool, router, subjects
from training.study.bench import Bench, Job, save
from training.study.options import PAIRS


def main(args: argparse.Namespace) -> int:
    """Work on what is missing, then write ``table.md``."""
    out: Path = args.out
    if args.threads:
        os.environ["OMP_NUM_THREADS"] = str(args.threads)  # also what gates train with
        torch.set_num_threads(args.threads)
    if args.part == "pool":
        work(pool.jobs(out, args.only))
    elif args.part != "table":
        bench = Bench(assets_dir() / "demo", args.steps, args.seeds)
        if args.part == "judge":
            judge_again(bench, out, args.only)
        else:
            work(jobs_of(args, bench, out))
    out.mkdir(parents=True, exist_ok=True)
    (out / "table.md").write_text(table(out))
    return 0


def work(jobs: list[Job]) -> None:
    """Make the results that are missing."""
    for path, job in jobs:
        if not path.exists():
            save(path, job())


def jobs_of(args: argparse.Namespace, bench: Bench, out: Path) -> list[Job]:
    """All results of a part."""
    if args.part == "forecast":
        return extra.forecast_jobs(bench, out)
    if args.part == "collapse":
        return extra.collapse_jobs(bench, out, args.composition)
    if args.part == "subjects":
        return subjects.jobs(bench, out, args.only)
    if args.part == "adapters":
        return adapters.jobs(bench, out, args.adapters, args.train_seeds, everyone=args.everyone)
    if args.part == "objectives":
        return objectives.jobs(bench, out, args.only, args.objectives)
    if args.part == "router":
        return router.jobs(bench, out, args.only)
    return pairs.jobs(bench, out, args.only, args.methods)


def judge_again(bench: Bench, out: Path, only: list[int] | None) -> None:
    """Today's judge looks at the pairs' stored pictures."""
    for number in only or range(len(PAIRS)):
        for path in sorted((out / "pairs").glob(f"{'+'.join(PAIRS[number])}.*.json")):
            save(path, pairs.judge_again(bench, path))


def table(out: Path) -> str:
    """All results found below ``out`` as Markdown."""
    parts = (subjects.table, pairs.table, extra.forecast_table, adapters.table, objectives.table, router.table)
    return "\n".join(line for part in parts for line in part(out)) + "\n"
