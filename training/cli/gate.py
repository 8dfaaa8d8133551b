"""``gate``: experts to a composition with learned gates."""

from __future__ import annotations

import argparse
from pathlib import Path

from mole_diffusion.errors import InvalidRequest
from training.cli.terminal import add_common, given_settings, train, work_folder
from training.config import parse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of ``gate``."""
    parser.add_argument(
        "--expert", action="append", required=True, metavar="FILE", help="LoRA file, or a demo expert's name; repeat"
    )
    parser.add_argument(
        "--views", action="append", default=[], metavar="DIR",
        help="pictures of the expert at the same position; without, an expert makes its own",
    )  # fmt: skip
    parser.add_argument("--method", choices=["learned", "static"], default="learned")
    parser.add_argument("--scope", choices=["sample", "token"], default="sample")
    parser.add_argument("--scale", choices=["softmax", "null", "sigmoid"], default="softmax")
    parser.add_argument("--gain", action="store_true", help="a learned factor for each gate")
    parser.add_argument("--objective", choices=["collage"], default="collage")
    parser.add_argument("--alpha", type=float, help="weight of the balance loss; default 0.5")
    parser.add_argument("--subject-weight", type=float, help="weight of subjects beside the background; default 1")
    parser.add_argument("--pool", type=int, help="training scenes; default 192")
    parser.add_argument("--validation", type=int, help="held-out scenes; default 24, 0 = none")
    parser.add_argument("--validate-every", type=int, help="steps between validations; default 50")
    parser.add_argument("--self-views", type=int, help="pictures that an expert makes of its subject; default 12")
    add_common(parser, "default 300", "default 2e-3 for the demo base, else 1e-5")


def main(args: argparse.Namespace) -> int:
    """``gate``: experts to a composition's file."""
    from training.build import GateExpert, build_gate, find_expert, phrase_of
    from training.tasks.gate import GateTrainingConfig

    if len(args.views) > len(args.expert):
        raise InvalidRequest(f"{len(args.views)} folders of views for {len(args.expert)} experts; give one for each.")
    names = ("base", "method", "scope", "scale", "gain", "objective", "alpha", "subject_weight", "pool")
    config = parse(GateTrainingConfig, given_settings(args, *names, "validation", "validate_every", "self_views"))
    experts = []
    for number, name in enumerate(args.expert):
        expert, views = find_expert(name)
        given = Path(args.views[number]) if number < len(args.views) else views
        experts.append(GateExpert(expert, phrase_of(expert), given))
    return train(args, lambda log: build_gate(config, experts, work_folder(args.out), log))
