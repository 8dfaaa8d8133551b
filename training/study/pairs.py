"""The study of two: every method on every pair, pictures, joint success, identity, held-out collage loss.

Identity is judged by EfficientNet-Lite0 (judge.py), which no training uses; alignment by the demo CLIP.
"""

from __future__ import annotations

import itertools
import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mole_diffusion import Expert, TriggerSpans, compose
from mole_diffusion.composition import nla, weighted_sum
from mole_diffusion.scoring.intervals import bootstrap_interval
from training.base.scenes import article, background_phrase
from training.build import GateExpert, build_gate
from training.objectives.collage import CollageConfig, make_pool
from training.objectives.held_out import held_out_collage_loss
from training.study.bench import Bench, Job, save_sheet
from training.study.options import METHODS, PAIRS, SCENES, TRAINED
from training.tasks.gate import GateTrainingConfig

HELD_OUT_SEED = 424_242


def jobs(bench: Bench, out: Path, only: list[int] | None, methods: list[str]) -> list[Job]:
    """One result per pair and method."""
    found: list[Job] = []
    for number in only or range(len(PAIRS)):
        for method in methods:
            path = out / "pairs" / f"{'+'.join(PAIRS[number])}.{method}.json"
            found.append((path, lambda n=number, m=method: study_pair(bench, PAIRS[n], m, out)))
    return found


def study_pair(bench: Bench, pair: tuple[str, str], method: str, out: Path) -> dict[str, Any]:
    """One method on one pair: pictures of five scenes, joint success, identity, alignment, held-out collage loss."""
    started = time.monotonic()
    experts = [bench.expert(name) for name in pair]
    composition, trained = _composition(bench, pair, experts, method, out)
    prompts = prompts_of(bench, pair)
    with composition:
        pictures = bench.draw(prompts, composition)
    texts = [bench.cards[name]["class"] for name in pair]
    plain = [
        prompt.replace(bench.phrase(pair[0]), texts[0]).replace(bench.phrase(pair[1]), texts[1]) for prompt in prompts
    ]
    aligned = torch.diagonal(bench.alignment.score(pictures, [p for p in plain for _ in range(bench.seeds)]))
    save_sheet(pictures, bench.seeds, out / "sheets" / f"{'+'.join(pair)}.{method}.png")
    pool = _held_out_pool(bench, pair)
    with composition:
        losses = held_out_collage_loss(composition, bench.pipe, bench.base, pool)
    return {
        "pair": list(pair), "method": method, **judge_pair(bench, pair, pictures), "seeds": bench.seeds,
        "alignment": aligned.tolist(), "collage": losses.tolist(), "train_seconds": trained,
        "seconds": time.monotonic() - started,
        "alignment_scorer": bench.alignment.label, "guidance": bench.base.default_guidance, "steps": bench.steps,
    }  # fmt: skip


def judge_pair(bench: Bench, pair: tuple[str, str], pictures: Tensor) -> dict[str, Any]:
    """What the judge says of pictures of a pair: success and identity of each, and of real scenes."""
    judge = bench.double
    wanted = (bench.names.index(pair[0]), bench.names.index(pair[1]))
    scores = judge.scores(pictures)
    found = judge.find(scores, [wanted] * len(pictures))
    return {
        "success": found.success.tolist(), "identity": scores[..., list(wanted)].max(1).mean(1).tolist(),
        "scorer": judge.label, "real_scenes": judge.success,
    }  # fmt: skip


def judge_again(bench: Bench, path: Path) -> dict[str, Any]:
    """A pair's result with its stored pictures seen by today's judge; everything else stays."""
    from PIL import Image

    record = json.loads(path.read_text())
    with Image.open(path.parents[1] / "sheets" / f"{path.stem}.png") as sheet:
        pixels, side = np.asarray(sheet.convert("RGB")), bench.base.resolution
    rows = pixels.reshape(pixels.shape[0] // side, side, pixels.shape[1] // side, side, 3).swapaxes(1, 2)
    pictures = torch.from_numpy(rows.reshape(-1, side, side, 3).copy()).permute(0, 3, 1, 2).float() / 255
    return {**record, **judge_pair(bench, tuple(record["pair"]), pictures)}


def prompts_of(bench: Bench, pair: tuple[str, str]) -> list[str]:
    """The pair in five scenes."""
    first, second = (article(bench.phrase(name)) for name in pair)
    return [f"{first} and {second} {background_phrase(scene)}" for scene in SCENES]


def _held_out_pool(bench: Bench, pair: tuple[str, str]) -> Any:
    """Collages from held-out views, with a seed that no training uses."""
    from training.data.subjects import load_subject

    found = [load_subject(name, bench.phrase(name), bench.root / "subjects" / name / "heldout") for name in pair]
    return make_pool(bench.pipe, bench.base, found, 32, HELD_OUT_SEED, config=CollageConfig.of(bench.base, single=0))


def _composition(bench: Bench, pair: tuple[str, str], experts: list[Expert], method: str, out: Path) -> Any:
    if method not in TRAINED:
        gate = {"nla": nla(2), "sum": weighted_sum(2), "spans": TriggerSpans()}[method]
        return compose(bench.pipe, experts, gate=gate, base=bench.base), 0.0
    started = time.monotonic()
    settings: dict[str, Any] = {"method": "static"} if method == "static" else {"scope": method}
    path = out / "compositions" / f"{'+'.join(pair)}.{method}.safetensors"
    return train_gates(bench, pair, settings, path, out / "work"), time.monotonic() - started


def train_gates(bench: Bench, pair: tuple[str, ...], settings: Mapping[str, Any], path: Path, work: Path) -> Any:
    """Train gates of a pair for ``bench.steps`` steps into ``path``; the composition, detached."""
    chosen = {"stop_on": "loss", "validate_every": max(25, bench.steps // 4), **settings}
    config = GateTrainingConfig("demo", steps=bench.steps, **chosen)
    named = [
        GateExpert(bench.expert(name), bench.phrase(name), bench.root / "subjects" / name / "train") for name in pair
    ]
    task = build_gate(config, named, work, lambda text: None)
    for step in range(task.total_steps):
        task.step(step)
    task.finish(path)
    task.composition.detach()
    bench.pipe = task.pipe
    return task.composition


def table(out: Path) -> list[str]:
    """All methods, with intervals over pairs."""
    found = [json.loads(path.read_text()) for path in sorted((out / "pairs").glob("*.json"))]
    lines = ["", "| method | joint success | identity | alignment | held-out collage loss | pairs | training s |",
              "|---|---|---|---|---|---|---|"]  # fmt: skip
    for method in METHODS:
        rows = [r for r in found if r["method"] == method]
        if rows:
            cells = [_cell(rows, key) for key in ("success", "identity", "alignment", "collage")]
            seconds = np.mean([r["train_seconds"] for r in rows])
            lines.append(f"| {method} | {' | '.join(cells)} | {len(rows)} | {seconds:.0f} |")
    lines += ["", *_paired(found, "collage", "collage loss"), *_paired(found, "success", "joint success")]
    lines += [f"- joint success of real scenes: {r['real_scenes']:.2f}" for r in found[:1]]
    if len({(r["scorer"], r["real_scenes"]) for r in found}) > 1:
        lines.append("- **Several judges made these: run `--part judge`.**")
    return lines


def _cell(rows: list[dict[str, Any]], key: str) -> str:
    values = np.concatenate([np.asarray(r[key], float) for r in rows])
    groups = [tuple(r["pair"]) for r in rows for _ in r[key]]
    return str(bootstrap_interval(values, groups))


def _paired(found: list[dict[str, Any]], key: str, words: str) -> list[str]:
    """Differences scene by scene or picture by picture, with intervals over pairs."""
    by = {(tuple(r["pair"]), r["method"]): np.asarray(r[key], float) for r in found}
    lines = []
    for gate, other in itertools.product(("sample", "token"), ("nla", "static")):
        pairs = [pair for pair, method in by if method == gate and (pair, other) in by]
        if pairs:
            gaps = np.concatenate([by[pair, gate] - by[pair, other] for pair in pairs])
            groups = [pair for pair in pairs for _ in by[pair, gate]]
            lines.append(f"- {words}, {gate} minus {other}: {bootstrap_interval(gaps, groups)}")
    return lines
