"""``router``: a pool of experts to one router that weighs any experts, also those it never saw."""

from __future__ import annotations

import argparse
from pathlib import Path

from mole_diffusion.errors import InvalidRequest
from training.cli.terminal import add_common, given_settings, train, work_folder
from training.config import parse

_NUMBERS = (
    ("--rank", int, "of the router's matrices; default 8"),
    ("--group", int, "experts that a step holds; default 4"),
    ("--dropout", float, "chance that an expert which a scene does not name is absent; default 0.5"),
    ("--distractors", int, "at most so many unnamed experts in a scene; default 2"),
    ("--held-out", float, "share of the experts that only the validation uses; default 0.2"),
    ("--pool", int, "training scenes; default 576"),
    ("--subject-weight", float, "weight of subjects beside the background; default 1"),
    ("--validation", int, "held-out scenes; default 24, 0 = none"),
    ("--validate-every", int, "steps between validations; default 100"),
    ("--self-views", int, "pictures that an expert makes of its subject; default 12"),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of ``router``."""
    parser.add_argument("--experts", type=Path, metavar="DIR", help="folder of LoRA files")
    parser.add_argument(
        "--expert", action="append", default=[], metavar="FILE", help="LoRA file, or a demo expert's name; repeat"
    )
    parser.add_argument(
        "--views-root", type=Path, metavar="DIR",
        help="holds a folder of pictures for each expert, named as its file; others make their own",
    )  # fmt: skip
    parser.add_argument("--scope", choices=["token", "sample"], help="weights per place, or per picture; default token")
    for option, kind, words in _NUMBERS:
        parser.add_argument(option, type=kind, help=words)
    add_common(parser, "default 600", "default 2e-3 for the demo base, else 1e-4")


def main(args: argparse.Namespace) -> int:
    """``router``: experts to a router's file."""
    from training.build import GateExpert, build_router, find_expert, phrase_of
    from training.ranks import Ranks
    from training.tasks.router_config import RouterTrainingConfig

    numbers = [option[2:].replace("-", "_") for option, _, _ in _NUMBERS]
    config = parse(RouterTrainingConfig, given_settings(args, "base", "scope", *numbers))
    experts = []
    for name in _files(args):
        expert, views = find_expert(name)
        own = None if args.views_root is None else args.views_root / Path(name).stem
        experts.append(GateExpert(expert, phrase_of(expert), own if own is not None and own.is_dir() else views))
    return train(args, lambda log: build_router(config, experts, work_folder(args.out), log, Ranks.here()))


def _files(args: argparse.Namespace) -> list[str]:
    """The experts of the folder by name, then those named one by one."""
    if args.experts is not None and not args.experts.is_dir():
        raise InvalidRequest(f"Expected a folder of LoRA files, but {args.experts} is not a folder.")
    if args.views_root is not None and not args.views_root.is_dir():
        raise InvalidRequest(f"Expected a folder of folders of pictures, but {args.views_root} is not a folder.")
    found = [] if args.experts is None else sorted(map(str, args.experts.glob("*.safetensors")))
    if not found and not args.expert:
        raise InvalidRequest("A router learns from a pool of experts: name their folder with --experts.")
    return [*found, *args.expert]
