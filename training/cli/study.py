"""``study``: what the demo's experts and compositions reach, with intervals."""

from __future__ import annotations

import argparse

from training.study import options


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of ``study``."""
    options.add_arguments(parser)


def main(args: argparse.Namespace) -> int:
    """``study``: work on what is missing of the evidence."""
    from training.study.run import main as work

    return work(args)
