"""LoRA against MoSLoRA (arXiv 2406.11909) at equal steps and equal parameters: are subjects more themselves?

A MoSLoRA of rank r has r² parameters more in every matrix than a LoRA of rank r; its rank is lowered until it has no
more than the LoRA it stands beside. Identity is judged by EfficientNet-Lite0 (judge.py), which no training uses;
alignment by the demo CLIP, with the class's word, for it knows no triggers.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mole_diffusion import Expert, StaticWeights, compose
from mole_diffusion.scoring.intervals import bootstrap_interval
from training.base.scenes import article, background_phrase
from training.build import build_subject
from training.study.bench import Bench, Job, ground_of
from training.study.options import ADAPTERS, BACKGROUNDS, SOME_SUBJECTS
from training.tasks.subject import SubjectConfig

RANK, STEPS = 16, 300


def jobs(bench: Bench, out: Path, kinds: Sequence[str], train_seeds: int, *, everyone: bool) -> list[Job]:
    """One result per subject, training seed and kind of adapter; kinds of one subject and seed follow each other."""
    folder, names = out / "adapters", bench.names if everyone else SOME_SUBJECTS
    return [
        (
            folder / f"{name}.{seed}.{kind}.json",
            lambda name=name, seed=seed, kind=kind: study_adapter(bench, name, kind, seed, folder),
        )
        for seed in range(train_seeds)
        for name in names
        for kind in kinds
    ]


def study_adapter(bench: Bench, name: str, kind: str, seed: int, folder: Path) -> dict[str, Any]:
    """Train one adapter and judge what it draws alone, five backgrounds times ``bench.seeds`` pictures."""
    path = folder / f"{name}.{seed}.{kind}.safetensors"
    fixed = kind in ("lora", "moslora-butterfly")  # nothing between A and B, or nothing that learns
    rank = RANK if fixed else rank_of_equal_size(bench, RANK)
    trained = train(bench, name, kind, rank, seed, path)
    expert, phrase = Expert.load(path, shapes=bench.base.module_shapes()), bench.phrase(name)
    composition = compose(bench.pipe, [expert], gate=StaticWeights((1.0,)), base=bench.base)
    pictures = bench.draw([f"{article(phrase)} {background_phrase(ground)}" for ground in BACKGROUNDS], composition)
    judge, index = bench.single, bench.names.index(name)
    scores = judge.scores(pictures)
    grounds = [ground for ground in BACKGROUNDS for _ in range(bench.seeds)]
    plain = [f"{article(bench.cards[name]['class'])} {background_phrase(ground)}" for ground in grounds]
    return {
        "subject": name, "kind": kind, "seed": seed, "rank": rank, **trained,
        "identity": scores[..., index].max(1).tolist(),
        "found": judge.find(scores, [(index,)] * len(scores)).success.tolist(),
        "alignment": torch.diagonal(bench.alignment.score(pictures, plain)).tolist(),
        "background": [ground_of(p) == g for p, g in zip(pictures, grounds, strict=True)],
        "scorer": judge.label, "alignment_scorer": bench.alignment.label,
    }  # fmt: skip


def train(bench: Bench, name: str, kind: str, rank: int, seed: int, path: Path) -> dict[str, Any]:
    """Train one adapter into ``path``; its parameters, seconds (preparation apart) and last losses."""
    card = bench.cards[name]
    settings: dict[str, Any] = {} if kind == "lora" else {"adapter": "moslora", "mixer": kind.removeprefix("moslora-")}
    config = SubjectConfig(
        "demo", card["trigger"], card["class"], name=name, rank=rank, steps=STEPS, seed=seed, **settings
    )
    task = build_subject(config, bench.root / "subjects" / name / "train")
    count = sum(parameter.numel() for parameter in task.parameters.values())
    started = time.monotonic()
    losses = [task.step(step)["loss"] for step in range(STEPS)]
    seconds = time.monotonic() - started
    task.finish(path)
    return {"parameters": count, "seconds": seconds, "last_loss": float(np.mean(losses[-50:]))}


def rank_of_equal_size(bench: Bench, rank: int) -> int:
    """The largest rank at which a MoSLoRA of the base's target modules has no more parameters than a LoRA of ``rank``.

    A module of weight (d_out, d_in, …) costs r·(d_in·k² + d_out) as LoRA and r² more as MoSLoRA.
    """
    shapes = bench.base.module_shapes()
    targets = [shapes[f"unet.{path}"] for path in bench.base.target_paths("unet")]
    sides = sum(int(np.prod(shape[1:])) + shape[0] for shape in targets)
    return max(r for r in range(1, rank + 1) if r * sides + len(targets) * r * r <= rank * sides)


def table(out: Path) -> list[str]:
    """All kinds, and MoSLoRA minus LoRA of the same subject and seed; intervals over subjects."""
    found = [json.loads(path.read_text()) for path in sorted((out / "adapters").glob("*.json"))]
    if not found:
        return []
    lines = ["", "| adapter | rank | parameters | identity | found | alignment | background kept | runs | training s |",
             "|---|---|---|---|---|---|---|---|---|"]  # fmt: skip
    for kind in ADAPTERS:
        rows = [r for r in found if r["kind"] == kind]
        if rows:
            cells = [_cell(rows, key) for key in ("identity", "found", "alignment", "background")]
            seconds = np.mean([r["seconds"] for r in rows])
            size = f"{rows[0]['rank']} | {rows[0]['parameters']:,}"
            lines.append(f"| {kind} | {size} | {' | '.join(cells)} | {len(rows)} | {seconds:.0f} |")
    return [*lines, "", *_differences(found)]


def _cell(rows: Sequence[dict[str, Any]], key: str) -> str:
    values = np.concatenate([np.asarray(r[key], float) for r in rows])
    return str(bootstrap_interval(values, [r["subject"] for r in rows for _ in r[key]]))


def _differences(found: Sequence[dict[str, Any]]) -> list[str]:
    by = {(r["subject"], r["seed"], r["kind"]): r for r in found}
    lines = []
    for kind in ADAPTERS[1:]:
        runs = [(s, n) for s, n, k in by if k == kind and (s, n, "lora") in by]
        for key in ("identity", "alignment") if runs else ():
            gaps = [np.subtract(by[(*run, kind)][key], by[(*run, "lora")][key]) for run in runs]
            groups = [run[0] for run, gap in zip(runs, gaps, strict=True) for _ in gap]
            lines.append(f"- {key}, {kind} minus lora: {bootstrap_interval(np.concatenate(gaps), groups)}")
    return lines
