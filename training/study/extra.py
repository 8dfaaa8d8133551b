"""Two smaller questions of the demo study: does the forecast of collisions tell who will be confused, and what is left
of learned gates when they are collapsed into one LoRA?"""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from mole_diffusion import compose, load_composition
from mole_diffusion.composition import nla, weighted_sum
from mole_diffusion.experts import Expert, forecast_collisions, save_expert
from mole_diffusion.scoring.intervals import bootstrap_interval
from mole_diffusion.scoring.report import leak_matrix
from training.base.scenes import article, background_phrase

if TYPE_CHECKING:
    from training.study.bench import Bench, Job

GROUNDS = ("green", "white")
RESAMPLES = 10_000


def measure_pair(bench: Bench, pair: tuple[str, str]) -> dict[str, Any]:
    """One pair under the plain sum: what the forecast says, and how they were confused.

    Confusion is the share of places most like one of the two that look most like the other; loss is how far likeness
    stays below what a subject reaches in real scenes.
    """
    experts = [bench.expert(name) for name in pair]
    first, second = (article(bench.phrase(name)) for name in pair)
    prompts = [f"{first} and {second} {background_phrase(ground)}" for ground in GROUNDS]
    pictures = bench.draw(prompts, compose(bench.pipe, experts, gate=weighted_sum(2), base=bench.base))
    judge, columns = bench.double, [bench.names.index(name) for name in pair]
    scores = judge.scores(pictures)
    leak = leak_matrix(scores, [tuple(columns)] * len(scores), len(bench.names))
    found = forecast_collisions(*experts)
    return {
        "pair": list(pair),
        "collision": found.whole.collision, "reads": found.whole.reads, "writes": found.whole.writes,
        "confusion": float((leak[columns[0], columns[1]] + leak[columns[1], columns[0]]) / 2),
        "loss": float(np.mean([judge.ceilings[c] - scores[..., c].max(1).mean() for c in columns])),
        "pictures": len(scores), "scorer": judge.label,
    }  # fmt: skip


def forecast_jobs(bench: Bench, out: Path) -> list[Job]:
    """Every pair of demo subjects."""
    folder = out / "forecast"
    pairs = itertools.combinations(bench.names, 2)
    return [(folder / f"{'+'.join(pair)}.json", lambda pair=pair: measure_pair(bench, pair)) for pair in pairs]


def collapse_jobs(bench: Bench, out: Path, files: Sequence[Path]) -> list[Job]:
    """One result per composition file."""
    folder = out / "collapse"
    return [(folder / f"{path.stem}.json", lambda path=path: study_collapse(bench, path, folder)) for path in files]


def forecast_table(out: Path) -> list[str]:
    """Rank correlations with their intervals over pairs."""
    rows = [json.loads(path.read_text()) for path in sorted((out / "forecast").glob("*.json"))]
    if len(rows) < 3:
        return []
    lines = ["", f"Forecast against measurement, {len(rows)} pairs, {rows[0]['pictures']} pictures each:", ""]
    for measured in ("confusion", "loss"):
        for said in ("collision", "reads", "writes"):
            x, y = (np.array([row[key] for row in rows]) for key in (said, measured))
            middle, (low, high) = rank_correlation(x, y), rank_interval(x, y)
            lines.append(f"- rank correlation of {said} with {measured}: {middle:.2f} ({low:.2f} to {high:.2f})")
    return lines


def rank_correlation(x: NDArray[np.floating], y: NDArray[np.floating]) -> float:
    """Spearman's ρ, ties with their mean rank; 0 where one side is constant."""
    first, second = _ranks(x), _ranks(y)
    if np.ptp(first) == 0 or np.ptp(second) == 0:
        return 0.0
    return float(np.corrcoef(first, second)[0, 1])


def rank_interval(x: NDArray[np.floating], y: NDArray[np.floating], seed: int = 0) -> tuple[float, float]:
    """95 % by bootstrap over pairs."""
    rng = np.random.default_rng(seed)
    drawn = (rng.integers(len(x), size=len(x)) for _ in range(RESAMPLES // 5))
    values = [rank_correlation(x[rows], y[rows]) for rows in drawn]
    return float(np.quantile(values, 0.025)), float(np.quantile(values, 0.975))


def _ranks(values: NDArray[np.floating]) -> NDArray[np.floating]:
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return (last - (counts - 1) / 2)[inverse].astype(float)


def study_collapse(bench: Bench, file: Path, out: Path) -> dict[str, Any]:
    """Live gates of a saved composition, the same collapsed to one kohya file, and NLA: identity and alignment.

    The calibration's prompts and seeds are not those that are scored.
    """
    experts = {expert.sha256: expert for expert in (bench.expert(name) for name in bench.names)}
    live = load_composition(file, bench.pipe, experts, bench.base)
    phrases = [article(bench.phrase(name)) for name in live.names]
    calibration = [f"{', '.join(order)} {background_phrase('blue')}" for order in (phrases, phrases[::-1])]
    traces = []
    for prompt in calibration:
        bench.draw([prompt], live)
        traces.append(live.trace())
    path = save_expert(live.collapse("collapsed", traces=traces), out / "collapsed.safetensors", format="kohya")
    one = Expert.load(path, shapes=bench.base.module_shapes())
    prompts = [f"{', '.join(phrases)} {background_phrase(ground)}" for ground in ("green", "white", "beach", "snow")]
    ways = {
        "live gates": live,
        "collapsed": compose(bench.pipe, [one], gate=weighted_sum(1), base=bench.base),
        "nla": compose(bench.pipe, live.experts, gate=nla(len(live.experts)), base=bench.base),
    }
    return {
        "experts": list(live.names), "rank": max(one.ranks), "pictures": len(prompts) * bench.seeds,
        **{way: _scores(bench, prompts, live.names, composition) for way, composition in ways.items()},
    }  # fmt: skip


def _scores(bench: Bench, prompts: Sequence[str], names: Sequence[str], composition: Any) -> dict[str, Any]:
    pictures = bench.draw(prompts, composition)
    judge, columns = bench.double, [bench.names.index(name) for name in names]
    likeness = judge.scores(pictures)[..., columns].max(1).mean(1)
    groups = [prompt for prompt in prompts for _ in range(bench.seeds)]
    plain = list(prompts)
    for name in names:
        plain = [prompt.replace(bench.phrase(name), bench.cards[name]["class"]) for prompt in plain]
    aligned = torch.diagonal(bench.alignment.score(pictures, [prompt for prompt in plain for _ in range(bench.seeds)]))
    return {
        "identity": str(bootstrap_interval(likeness, groups)),
        "alignment": str(bootstrap_interval(aligned.numpy(), groups)),
        "scorers": f"{judge.label}; {bench.alignment.label}",
    }  # fmt: skip
