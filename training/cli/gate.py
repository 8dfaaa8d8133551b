"""``gate``: experts to a composition with learned gates."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mole_diffusion.errors import InvalidRequest
from training.cli.terminal import add_common, given_settings, train, work_folder
from training.config import parse

if TYPE_CHECKING:
    from training.build import GateExpert

_NUMBERS = (
    ("--alpha", float, "weight of the balance loss; default 0.5"),
    ("--subject-weight", float, "weight of subjects beside the background; default 1"),
    ("--prompt-dropout", float, "chance of an empty prompt; default 0"),
    ("--clip-weight", float, "weight of the CLIP loss, objective both; default 0.1"),
    ("--clip-global", float, "weight of picture against prompt; default 1"),
    ("--clip-local", float, "weight of each subject's place against its class; default 1"),
    ("--clip-direction", float, "weight of the change of picture against that of words; default 0.5"),
    ("--clip-from", float, "part of the schedule where the CLIP loss begins, 0 = clean; default 0"),
    ("--clip-until", float, "part of the schedule where it ends; default 0.7"),
    ("--clip-side", int, "pixels at which it decodes; default the base's, at most 256"),
    ("--pool", int, "training scenes; default 192"),
    ("--validation", int, "held-out scenes; default 24, 0 = none"),
    ("--validate-every", int, "steps between validations; default 50"),
    ("--validate-prompts", int, "pictures of a validation; default 4, 0 = none"),
    ("--validate-picture-steps", int, "denoising steps of each; default 12"),
    ("--patience", int, "validations without improvement that end training; 0 = never; default 4 on the score"),
    ("--self-views", int, "pictures that an expert makes of its subject; default 12"),
)


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
    parser.add_argument("--objective", choices=["collage", "clip", "both"], default="collage")
    parser.add_argument(
        "--balance", choices=["mole", "entropy", "none"], help="what keeps experts in use; default mole"
    )
    parser.add_argument("--stop-on", choices=["score", "loss"], help="what says which gates are best; default score")
    parser.add_argument("--clip-model", help="image-text model that trains; default by base")
    for option, kind, words in _NUMBERS:
        parser.add_argument(option, type=kind, help=words)
    parser.add_argument("--warm-start", type=Path, metavar="FILE", help="composition of some of these experts")
    parser.add_argument(
        "--cache", type=Path, metavar="DIR", help="keeps gates and pictures; the same set is ready at once"
    )
    add_common(parser, "default 300", "default 2e-3 for the demo base, else 1e-5")


def main(args: argparse.Namespace) -> int:
    """``gate``: experts to a composition's file."""
    from training.build import GateExpert, build_gate, find_expert, phrase_of
    from training.ranks import Ranks
    from training.tasks.gate import GateTrainingConfig

    if len(args.views) > len(args.expert):
        raise InvalidRequest(f"{len(args.views)} folders of views for {len(args.expert)} experts; give one for each.")
    if args.warm_start is not None and not args.warm_start.is_file():
        raise InvalidRequest(f"There is no composition {args.warm_start} to start from.")
    numbers = [option[2:].replace("-", "_") for option, _, _ in _NUMBERS]
    names = ("base", "method", "scope", "scale", "gain", "objective", "balance", "stop_on", "clip_model", *numbers)
    config = parse(GateTrainingConfig, given_settings(args, *names))
    experts = []
    for number, name in enumerate(args.expert):
        expert, views = find_expert(name)
        given = Path(args.views[number]) if number < len(args.views) else views
        experts.append(GateExpert(expert, phrase_of(expert), given))
    cache = None if args.cache is None else _Cache(args, config, experts)
    if cache is not None and cache.answers():
        return 0
    work = work_folder(args.out) if args.cache is None else args.cache / "views"
    code = train(
        args, lambda log: build_gate(config, experts, work, log, warm_start=args.warm_start, ranks=Ranks.here())
    )
    if cache is not None and code == 0 and Ranks.here().first:
        cache.keep()
    return code


class _Cache:
    """Gates trained before, for ``--cache``."""

    def __init__(self, args: argparse.Namespace, config: Any, experts: list[GateExpert]) -> None:
        from mole_diffusion.bases import get_base
        from training.gate_cache import composition_key

        self._args, self._experts, self._folder = args, experts, args.cache / "compositions"
        self._key = composition_key(config, get_base(config.base), experts, warm_start=args.warm_start)

    def answers(self) -> bool:
        """Write what is there for this set and say so; False where nothing is."""
        from training.gate_cache import cached_composition
        from training.ranks import Ranks

        path = cached_composition(self._key, self._folder, self._experts, self._args.out)
        if path is None:
            return False
        names = [item.expert.name for item in self._experts]
        found = {"status": "finished", "step": 0, "path": str(path), "experts": names, "cached": True}
        if Ranks.here().first:
            sys.stdout.write(json.dumps(found) + "\n" if self._args.json else f"Wrote {path}, trained before\n")
        return True

    def keep(self) -> None:
        """Store what was just trained."""
        from training.gate_cache import store_composition

        store_composition(self._args.out, self._key, self._folder)
