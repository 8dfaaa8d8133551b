"""What gates learn from: collages, CLIP (arXiv 2404.13628), or both, each with and without L_balance.

Token gates on four pairs. Judged like the study of pairs: EfficientNet-Lite0 says who is there, and neither trains nor
stops these gates; the demo CLIP, which trains some of them, reports nothing here.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mole_diffusion.generation import GenerationRequest, generate
from mole_diffusion.scoring.intervals import bootstrap_interval
from training.study.bench import Bench, Job, save_sheet
from training.study.options import OBJECTIVES, PAIRS
from training.study.pairs import judge_pair, prompts_of, train_gates

FOUR = PAIRS[:4]
ALPHAS = (0.5, 0.0)
UNSEEN = {"validation": 0, "validate_prompts": 0, "stop_on": None}
"""No choice among the gates of a run, which would favour the objective that chooses: the last ones are judged."""


def jobs(bench: Bench, out: Path, only: Sequence[int] | None, objectives: Sequence[str]) -> list[Job]:
    """One result per pair, objective and α."""
    folder = out / "objectives"
    return [
        (
            folder / f"{'+'.join(FOUR[number])}.{objective}.{alpha:g}.json",
            lambda n=number, o=objective, a=alpha: study_objective(bench, FOUR[n], o, a, folder),
        )
        for number in only or range(len(FOUR))
        for objective in objectives
        for alpha in ALPHAS
    ]


def study_objective(bench: Bench, pair: tuple[str, str], objective: str, alpha: float, folder: Path) -> dict[str, Any]:
    """Train token gates on one objective; pictures of five scenes, judged, and how decided the gates are."""
    settings = {"scope": "token", "objective": objective, "alpha": alpha, **UNSEEN}
    path = folder / "compositions" / f"{'+'.join(pair)}.{objective}.{alpha:g}.safetensors"
    started = time.monotonic()
    composition = train_gates(bench, pair, settings, path, folder / "work")
    seconds = time.monotonic() - started
    with composition:
        pictures = bench.draw(prompts_of(bench, pair), composition)
        entropy = float(np.mean([_entropy(bench, prompt, composition) for prompt in prompts_of(bench, pair)]))
    save_sheet(pictures, bench.seeds, folder / "sheets" / f"{path.stem}.png")
    return {
        "pair": list(pair), "objective": objective, "alpha": alpha, **judge_pair(bench, pair, pictures),
        "entropy": entropy, "train_seconds": seconds, "seeds": bench.seeds, "steps": bench.steps,
    }  # fmt: skip


def _entropy(bench: Bench, prompt: str, composition: Any) -> float:
    """Mean entropy of the gates over blocks, steps and places of one picture, as a share of the entropy of NLA."""
    request = GenerationRequest(prompt, steps=10, score_every=0, preview_every=0)
    generate(bench.pipe, bench.base, request, composition=composition)
    trace = composition.trace()
    maps = [item.float().flatten(1) for block in trace.maps.values() for item in block]
    shares = [item / item.sum(0, keepdim=True).clamp(min=1e-6) for item in maps]
    bits = [-(share * share.clamp(min=1e-12).log()).sum(0).mean() for share in shares]
    return float(torch.stack(bits).mean()) / math.log(len(trace.names))


def table(out: Path) -> list[str]:
    """All objectives, intervals over pairs; and what L_balance changes."""
    found = [json.loads(path.read_text()) for path in sorted((out / "objectives").glob("*.json"))]
    if not found:
        return []
    lines = ["", "| objective | α | joint success | identity | gate entropy / NLA's | pairs | training s |",
             "|---|---|---|---|---|---|---|"]  # fmt: skip
    for objective in OBJECTIVES:
        for alpha in ALPHAS:
            rows = [r for r in found if (r["objective"], r["alpha"]) == (objective, alpha)]
            if rows:
                entropy, seconds = (float(np.mean([r[key] for r in rows])) for key in ("entropy", "train_seconds"))
                cells = f"{_cell(rows, 'success')} | {_cell(rows, 'identity')} | {entropy:.3f}"
                lines.append(f"| {objective} | {alpha:g} | {cells} | {len(rows)} | {seconds:.0f} |")
    return [*lines, "", *_differences(found)]


def _cell(rows: Sequence[dict[str, Any]], key: str) -> str:
    values = np.concatenate([np.asarray(r[key], float) for r in rows])
    return str(bootstrap_interval(values, [tuple(r["pair"]) for r in rows for _ in r[key]]))


def _differences(found: Sequence[dict[str, Any]]) -> list[str]:
    """Against collages with L_balance, and L_balance against none, picture by picture."""
    by = {(tuple(r["pair"]), r["objective"], r["alpha"]): np.asarray(r["success"], float) for r in found}
    ways = [((o, 0.5), ("collage", 0.5)) for o in OBJECTIVES[1:]] + [((o, 0.5), (o, 0.0)) for o in OBJECTIVES]
    lines = []
    for one, other in ways:
        pairs = [pair for pair in FOUR if (pair, *one) in by and (pair, *other) in by]
        if pairs:
            gaps = np.concatenate([by[(pair, *one)] - by[(pair, *other)] for pair in pairs])
            groups = [pair for pair in pairs for _ in by[(pair, *one)]]
            words = f"{one[0]} α {one[1]:g} minus {other[0]} α {other[1]:g}"
            lines.append(f"- joint success, {words}: {bootstrap_interval(gaps, groups)}")
    return lines
