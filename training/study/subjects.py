"""Each expert alone: identity against floor and ceiling, and whether the background stays what was asked."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from mole_diffusion import StaticWeights, compose
from training.base.scenes import article, background_phrase
from training.study.bench import Bench, Job, ground_of, interval
from training.study.options import BACKGROUNDS


def jobs(bench: Bench, out: Path, only: list[int] | None) -> list[Job]:
    """One result per subject."""
    names = [bench.names[number] for number in only or range(len(bench.names))]
    return [(out / "subjects" / f"{name}.json", lambda name=name: study_subject(bench, name)) for name in names]


def study_subject(bench: Bench, name: str) -> dict[str, Any]:
    """Identity with the expert, without it (floor), of real scenes (ceiling); backgrounds that stay what was asked."""
    judge, index, phrase = bench.single, bench.names.index(name), bench.phrase(name)
    prompts = [f"{article(phrase)} {background_phrase(ground)}" for ground in BACKGROUNDS]
    plain = [f"{article(bench.cards[name]['class'])} {background_phrase(ground)}" for ground in BACKGROUNDS]
    composition = compose(bench.pipe, [bench.expert(name)], gate=StaticWeights((1.0,)), base=bench.base)
    pictures, floor = bench.draw(prompts, composition), bench.draw(plain)
    scores = judge.scores(pictures)
    own = scores[..., index].max(1)
    found = judge.find(scores, [(index,)] * len(scores))
    groups = [ground for ground in BACKGROUNDS for _ in range(bench.seeds)]
    return {
        "subject": name, "identity": interval(own, groups),
        "floor": float(judge.scores(floor)[..., index].max(1).mean()),
        "ceiling": float(judge.ceilings[index]), "success": float(found.success.mean()),
        "background_kept": float(np.mean([ground_of(p) == g for p, g in zip(pictures, groups, strict=True)])),
        "background_base": float(np.mean([ground_of(p) == g for p, g in zip(floor, groups, strict=True)])),
        "scorer": judge.label, "pictures": len(own), "real_scenes": float(judge.successes[index]),
    }  # fmt: skip


def table(out: Path) -> list[str]:
    """All results, a row each."""
    lines = [
        "| subject | identity | floor | ceiling | found (real scenes) | background kept (base) |",
        "|---|---|---|---|---|---|",
    ]
    for path in sorted((out / "subjects").glob("*.json")):
        r = json.loads(path.read_text())
        i = r["identity"]
        lines.append(f"| {r['subject']} | {i['mean']:.3f} [{i['low']:.3f}, {i['high']:.3f}] | {r['floor']:.3f} | "
                     f"{r['ceiling']:.3f} | {r['success']:.2f} ({r['real_scenes']:.2f}) | {r['background_kept']:.2f} "
                     f"({r['background_base']:.2f}) |")  # fmt: skip
    return lines
