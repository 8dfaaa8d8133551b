"""``subject``: pictures of a subject to an expert (DreamBooth with LoRA or MoSLoRA)."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from training.cli.terminal import add_common, given_settings, train, work_folder
from training.presets import PRESETS

NAMES = (
    "base", "token", "adapter", "mixer", "targets", "rank", "alpha", "accumulate", "train_text_encoders", "text_lr",
    "optimiser", "schedule", "warmup", "checkpointing", "offload", "captions", "flip", "prior_pictures",
    "prior_weight", "snr_gamma",
)  # fmt: skip


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of ``subject``."""
    parser.add_argument("--images", type=Path, required=True, help="folder of pictures of the subject")
    parser.add_argument("--token", required=True, help="new word that will call it, for instance zwx")
    parser.add_argument("--class", dest="class_name", required=True, help="what it is, for instance robot")
    parser.add_argument(
        "--preset", choices=list(PRESETS), help="defaults for a GPU's memory, or a paper's; see --list-presets"
    )
    parser.add_argument("--list-presets", action=ListPresets, help="say what each preset trades, and end")
    _add_adapter(parser.add_argument_group("adapter"))
    _add_pictures(parser.add_argument_group("pictures"))
    _add_optimisation(parser.add_argument_group("optimisation and memory"))
    add_common(parser, "default 400", "default 1e-3 for the demo base, else 1e-4")
    parser.set_defaults(base=None)  # so that a preset may name one; demo where nobody does


def _add_adapter(group: argparse._ArgumentGroup) -> None:
    mixers = ["orthogonal", "kaiming", "normal", "identity", "butterfly"]
    group.add_argument("--adapter", choices=["lora", "moslora"], help="default lora")
    group.add_argument("--mixer", choices=mixers, help="how moslora's mixer starts; default orthogonal")
    group.add_argument("--targets", choices=["all", "attention"], help="modules that learn; default the base's")
    group.add_argument("--rank", type=int, help="default 16")
    group.add_argument("--alpha", type=int, help="default the rank")
    _add_switch(group, "--train-text-encoders", "train the base's text encoders too; default off")
    group.add_argument("--text-lr", type=float, help="their learning rate; default half of --lr")


def _add_pictures(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--captions", "--caption", choices=["given", "auto", "off"],
                       help="of photos: .txt files or metadata.jsonl beside them, a model for those without, or none; "
                            "default given")  # fmt: skip
    _add_switch(group, "--flip", "mirror half of the pictures; not for writing or one-sided subjects; default off")
    group.add_argument("--prior-pictures", type=int, help="pictures of the class for prior preservation; default 0")
    group.add_argument("--prior-weight", type=float, help="weight of their loss; default 1")


def _add_optimisation(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--accumulate", type=int, help="batches that make one step; default 1")
    group.add_argument("--optimiser", choices=["adamw", "adamw8bit"], help="default adamw")
    group.add_argument("--schedule", choices=["constant", "cosine"], help="of the learning rate; default constant")
    group.add_argument("--warmup", type=int, help="steps in which the rate rises; default 0")
    group.add_argument("--snr-gamma", type=float, help="min-SNR weighting; default off")
    _add_switch(group, "--checkpointing", "compute activations twice; default for full-size bases on a GPU")
    _add_switch(group, "--offload", "keep what no step needs in the machine's memory; default off")


def _add_switch(group: argparse._ArgumentGroup, name: str, text: str) -> None:
    group.add_argument(name, action=argparse.BooleanOptionalAction, default=None, help=text)


class ListPresets(argparse.Action):
    """Prints the presets and ends, whatever else is missing."""

    def __init__(self, option_strings: Sequence[str], dest: str, **options: Any) -> None:
        super().__init__(option_strings, dest, nargs=0, **options)

    def __call__(self, parser: argparse.ArgumentParser, *words: Any, **options: Any) -> None:
        """Print and end."""
        sys.stdout.write("\n".join(preset_lines()) + "\n")
        parser.exit()


def preset_lines() -> list[str]:
    """Each preset with its estimates and what it trades."""
    from mole_diffusion.bases import get_base
    from training.memory import estimate
    from training.tasks.subject_config import SubjectConfig

    lines = ["Memory is estimated by counting weights, adapter, optimiser and activations."]
    for name, item in PRESETS.items():
        figures = []
        for base in ("sd21-base", "sdxl") if "base" not in item.common else (item.common["base"],):
            config = SubjectConfig.of(name, **{"token": "zwx", "class": "thing", "base": base})
            figures.append(f"{base} about {estimate(get_base(base), config).gib:.1f} GiB")
        lines.append(f"{name:20} {', '.join(figures)}. {item.trades}")
    return lines


def main(args: argparse.Namespace) -> int:
    """``subject``: pictures of a subject to an expert's file."""
    from training.build import build_subject
    from training.ranks import Ranks
    from training.tasks.subject_config import SubjectConfig

    settings = given_settings(args, *NAMES, **{"class": args.class_name})
    if "base" not in settings and (args.preset is None or "base" not in PRESETS[args.preset].common):
        settings["base"] = "demo"
    config = SubjectConfig.of(args.preset, **settings)
    work = work_folder(args.out)
    return train(args, lambda log: build_subject(config, args.images, work, log, Ranks.here()))
