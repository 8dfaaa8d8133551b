"""``subject``: pictures of a subject to an expert (DreamBooth with LoRA)."""

from __future__ import annotations

import argparse
from pathlib import Path

from training.cli.terminal import add_common, given_settings, train
from training.config import parse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of ``subject``."""
    parser.add_argument("--images", type=Path, required=True, help="folder of pictures of the subject")
    parser.add_argument("--token", required=True, help="new word that will call it, for instance zwx")
    parser.add_argument("--class", dest="class_name", required=True, help="what it is, for instance robot")
    parser.add_argument("--adapter", choices=["lora"], default="lora")
    parser.add_argument("--rank", type=int, help="default 16")
    parser.add_argument("--no-flip", action="store_true", help="the subject has a left and a right")
    parser.add_argument("--prior-pictures", type=int, help="pictures of the class for prior preservation; default 0")
    parser.add_argument("--snr-gamma", type=float, help="min-SNR weighting; default off")
    add_common(parser, "default 400", "default 1e-3 for the demo base, else 1e-4")


def main(args: argparse.Namespace) -> int:
    """``subject``: pictures of a subject to an expert's file."""
    from training.build import build_subject
    from training.tasks.subject import SubjectConfig

    names = ("base", "token", "adapter", "rank", "prior_pictures", "snr_gamma")
    settings = given_settings(args, *names, **{"class": args.class_name}, flip=False if args.no_flip else None)
    config = parse(SubjectConfig, settings)
    return train(args, lambda log: build_subject(config, args.images))
