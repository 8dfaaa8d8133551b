"""What ``python -m training study`` covers, and its options; light, so that ``--help`` loads no model."""

from __future__ import annotations

import argparse
from pathlib import Path

PAIRS = (
    ("robot", "zombie"), ("adventuress", "greenling"), ("leo", "pinkling"), ("adventurer", "robot"),
    ("mia", "zombie"), ("greenling", "leo"),
)  # fmt: skip
SCENES = ("green", "blue", "beach", "snow", "night")
BACKGROUNDS = ("green", "blue", "red", "yellow", "white")
METHODS = ("nla", "sum", "spans", "static", "sample", "token")
TRAINED = ("static", "sample", "token")
ADAPTERS = ("lora", "moslora-orthogonal", "moslora-kaiming", "moslora-identity", "moslora-butterfly")
OBJECTIVES = ("collage", "clip", "both")
SOME_SUBJECTS = ("adventuress", "greenling", "leo", "robot")
PARTS = {
    "subjects": "each shipped expert alone",
    "pairs": "every method on every pair",
    "judge": "look at the pairs' stored pictures again",
    "forecast": "all pairs of subjects under the plain sum, against the forecast of collisions",
    "collapse": "a composition live and as one LoRA",
    "adapters": "LoRA against MoSLoRA at equal steps and parameters",
    "pool": "cheap experts for the router to learn from",
    "router": "a router trained over the pool, on every pair of subjects that it never saw",
    "objectives": "token gates trained on collages, CLIP, or both, with and without balance",
    "table": "only write table.md",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    parser.add_argument("--out", type=Path, default=Path("runs/study"), help="results, sheets and compositions")
    parser.add_argument("--part", choices=PARTS, default="table", help="; ".join(f"{k}: {v}" for k, v in PARTS.items()))
    parser.add_argument("--composition", type=Path, nargs="+", default=[], help="files for --part collapse")
    parser.add_argument("--only", type=int, nargs="+", help="numbers of the subjects or pairs to work on; default all")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--steps", type=int, default=150, help="training steps of gates and learned static weights")
    parser.add_argument("--seeds", type=int, default=8, help="pictures per prompt")
    parser.add_argument("--threads", type=int, help="default: all cores")
    parser.add_argument("--adapters", nargs="+", choices=ADAPTERS, default=list(ADAPTERS[:2]))
    parser.add_argument("--train-seeds", type=int, default=2, help="seeds of training in --part adapters")
    parser.add_argument("--everyone", action="store_true", help="--part adapters with all subjects, not four")
    parser.add_argument("--objectives", nargs="+", choices=OBJECTIVES, default=list(OBJECTIVES))
