"""A router on subjects that neither it nor its pool saw: six pairs of demo subjects, judged like the study of pairs.

It stands beside NLA, trigger spans and token gates that were trained for each pair; those are results of the part
"pairs", made where they are missing, with the same scenes and seeds.
"""

from __future__ import annotations

import json
import math
import time
from pathlib import Path
from typing import Any

import numpy as np

from mole_diffusion import compose
from mole_diffusion.errors import InvalidRequest
from mole_diffusion.gates.router_file import load_router, read_router_header
from mole_diffusion.scoring.intervals import bootstrap_interval
from training.data.subjects import load_subject
from training.objectives.collage import CollageConfig, make_pool
from training.objectives.held_out import held_out_collage_loss
from training.study import pairs
from training.study.bench import Bench, Job, save_sheet
from training.study.options import PAIRS
from training.study.pairs import HELD_OUT_SEED, judge_pair, prompts_of

BESIDE = ("nla", "spans", "token")
MEASURES = {"success": "joint success", "identity": "identity", "collage": "held-out collage loss"}


def jobs(bench: Bench, out: Path, only: list[int] | None) -> list[Job]:
    """The router on every pair, and what stands beside it. Raises InvalidRequest where there is no router yet."""
    file = router_file(out)
    if not file.is_file():
        raise InvalidRequest(
            f"There is no router at {file}: train one with 'python -m training router --base demo --experts "
            f"{out / 'pool'} --views-root {out / 'pool' / 'views'} --out {file}'; the pool is --part pool."
        )
    own: list[Job] = [
        (out / "router" / f"{'+'.join(PAIRS[n])}.json", lambda n=n: study_router(bench, PAIRS[n], file))
        for n in (only if only is not None else range(len(PAIRS)))
    ]
    return own + pairs.jobs(bench, out, only, list(BESIDE))


def router_file(out: Path) -> Path:
    """Where the study expects the router."""
    return out / "router" / "router.safetensors"


def study_router(bench: Bench, pair: tuple[str, str], file: Path) -> dict[str, Any]:
    """The router on one pair: pictures of five scenes, joint success, identity, held-out collage loss."""
    started = time.monotonic()
    experts = [bench.expert(name) for name in pair]
    composition = compose(bench.pipe, experts, gate=load_router(file, bench.base), base=bench.base)
    views = [load_subject(name, bench.phrase(name), bench.root / "subjects" / name / "heldout") for name in pair]
    scenes = make_pool(
        bench.pipe, bench.base, views, 32, HELD_OUT_SEED, config=CollageConfig.of(bench.base, single=0)
    )  # the very scenes of the study of pairs
    with composition:
        pictures = bench.draw(prompts_of(bench, pair), composition)
        losses = held_out_collage_loss(composition, bench.pipe, bench.base, scenes)
    save_sheet(pictures, bench.seeds, file.parent / "sheets" / f"{'+'.join(pair)}.png")
    return {
        "pair": list(pair), "method": "router", **judge_pair(bench, pair, pictures), "seeds": bench.seeds,
        "collage": losses.tolist(), "train_seconds": 0.0, "seconds": time.monotonic() - started,
        "recipe": read_router_header(file).recipe,
    }  # fmt: skip


HELD_OUT = {"held_out_loss": "", "nla_loss": "NLA", "spans_loss": "trigger spans"}


def table(out: Path) -> list[str]:
    """The router and what stands beside it, intervals over pairs; differences picture by picture."""
    own = [json.loads(path.read_text()) for path in sorted((out / "router").glob("*.json"))]
    if not own:
        return []
    known = {tuple(r["pair"]) for r in own}
    beside = [json.loads(path.read_text()) for path in sorted((out / "pairs").glob("*.json"))]
    found = own + [r for r in beside if r["method"] in BESIDE and tuple(r["pair"]) in known]
    recipe = own[0]["recipe"]
    lines = [
        "", f"Router over {recipe['experts']} experts, {recipe['steps']} steps; on its held-out pairs collage loss "
        + ", ".join(f"{words} {recipe.get(key, math.nan):.4f}".strip() for key, words in HELD_OUT.items()),
        "", "| method | joint success | identity | held-out collage loss | pairs | pictures | training s per pair |",
        "|---|---|---|---|---|---|---|",
    ]  # fmt: skip
    for method in (*BESIDE, "router"):
        rows = [r for r in found if r["method"] == method]
        if rows:
            cells = " | ".join(_cell(rows, key) for key in MEASURES)
            pictures, seconds = sum(len(r["success"]) for r in rows), np.mean([r["train_seconds"] for r in rows])
            lines.append(f"| {method} | {cells} | {len(rows)} | {pictures} | {seconds:.0f} |")
    if len({(r["scorer"], r["real_scenes"]) for r in found}) > 1:
        return [*lines, "", "- **Several judges made these: remove router/*.json and run `--part router` again.**"]
    return [*lines, "", *_differences(found)]


def _cell(rows: list[dict[str, Any]], key: str) -> str:
    values = np.concatenate([np.asarray(r[key], float) for r in rows])
    return str(bootstrap_interval(values, [tuple(r["pair"]) for r in rows for _ in r[key]]))


def _differences(found: list[dict[str, Any]]) -> list[str]:
    """The router minus each other way, where both drew the same pictures."""
    by = {(r["method"], tuple(r["pair"])): r for r in found}
    lines = []
    for key, words in MEASURES.items():
        for other in BESIDE:
            both = [(r, by[other, pair]) for (way, pair), r in by.items() if way == "router" and (other, pair) in by]
            same = [(one, two) for one, two in both if len(one[key]) == len(two[key])]
            if same:
                gaps = np.concatenate([np.asarray(one[key], float) - np.asarray(two[key], float) for one, two in same])
                groups = [tuple(one["pair"]) for one, _ in same for _ in one[key]]
                lines.append(f"- {words}, router minus {other}: {bootstrap_interval(gaps, groups)}")
    return lines
