"""The demo world's evidence: what each subject's expert keeps, and which composition shows two subjects best.

Results are one JSON file per subject, and per pair and method, so a study that is stopped goes on where it was.
Identity is judged by EfficientNet-Lite0 (study_judge.py), which no training uses; alignment by the demo CLIP.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mole_diffusion import Expert, StaticWeights, TriggerSpans, compose
from mole_diffusion.bases import assets_dir, get_base
from mole_diffusion.composition import nla, weighted_sum
from mole_diffusion.errors import InvalidRequest
from mole_diffusion.generation import GenerationRequest, generate
from mole_diffusion.scoring.alignment import load_alignment
from mole_diffusion.scoring.intervals import bootstrap_interval
from mole_diffusion.scoring.views import load_views
from training.base.scenes import COLOURS, article, background_phrase
from training.build import GateExpert, build_gate
from training.data.paste import to_tensor
from training.objectives.collage import CollageConfig, make_pool
from training.objectives.held_out import held_out_collage_loss
from training.study_extra import forecast_jobs, forecast_table, save, study_collapse
from training.study_judge import SubjectJudge
from training.study_options import BACKGROUNDS, METHODS, PAIRS, SCENES, TRAINED
from training.tasks.gate import GateTrainingConfig

HELD_OUT_SEED = 424_242


@dataclass
class Bench:
    """The base, its subjects with their held-out views, and who judges pictures of them."""

    root: Path
    steps: int
    seeds: int

    def __post_init__(self) -> None:
        self.base = get_base("demo")
        self.pipe = self.base.load(torch.device("cpu"), torch.float32)
        self.alignment = load_alignment(self.base, torch.device("cpu"))
        folder = self.root / "subjects"
        self.cards = {path.parent.name: json.loads(path.read_text()) for path in sorted(folder.glob("*/subject.json"))}
        if not self.cards:
            raise InvalidRequest(f"There are no demo subjects below {folder}: run 'training base --stages subjects'.")
        self.names = tuple(self.cards)
        self.views = {name: load_views(folder / name / "heldout") for name in self.names}
        self.posed = {name: load_views(folder / name / "train") for name in self.names}

    @cached_property
    def single(self) -> SubjectJudge:
        """Judges pictures of one subject."""
        return SubjectJudge(self.base, self.pipe, self.views, self.posed, 1)

    @cached_property
    def double(self) -> SubjectJudge:
        """Judges pictures of two subjects."""
        return SubjectJudge(self.base, self.pipe, self.views, self.posed, 2)

    def phrase(self, name: str) -> str:
        """Trigger and class, for instance "sks robot"."""
        return f"{self.cards[name]['trigger']} {self.cards[name]['class']}"

    def expert(self, name: str) -> Expert:
        """The shipped LoRA of a subject."""
        return Expert.load(self.root / "experts" / f"{name}.safetensors")

    def draw(self, prompts: Sequence[str], composition: Any = None) -> Tensor:
        """``seeds`` pictures of every prompt, (prompts * seeds, 3, H, W) in 0..1."""
        made = []
        for prompt in prompts:
            request = GenerationRequest(prompt, count=self.seeds, steps=20, score_every=0, preview_every=0)
            result = generate(self.pipe, self.base, request, composition=composition)
            made += [to_tensor(image) for image in result.images]
        return torch.stack(made)


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
        "subject": name, "identity": _interval(own, groups),
        "floor": float(judge.scores(floor)[..., index].max(1).mean()),
        "ceiling": float(judge.ceilings[index]), "success": float(found.success.mean()),
        "background_kept": float(np.mean([_ground(p) == g for p, g in zip(pictures, groups, strict=True)])),
        "background_base": float(np.mean([_ground(p) == g for p, g in zip(floor, groups, strict=True)])),
        "scorer": judge.label, "pictures": len(own), "real_scenes": float(judge.successes[index]),
    }  # fmt: skip


def _ground(picture: Tensor) -> str:
    """The named colour nearest to the median of a picture's border."""
    ring = torch.cat([picture[:, 0], picture[:, -1], picture[:, :, 0], picture[:, :, -1]], -1).median(-1).values * 255
    colours = torch.tensor(list(COLOURS.values()), dtype=torch.float32)
    return tuple(COLOURS)[int((colours - ring).square().sum(1).argmin())]


def _interval(values: np.ndarray, groups: Sequence[Any]) -> dict[str, float]:
    found = bootstrap_interval(values, groups)
    return {"mean": found.mean, "low": found.low, "high": found.high}


def study_pair(bench: Bench, pair: tuple[str, str], method: str, out: Path) -> dict[str, Any]:
    """One method on one pair: pictures of five scenes, joint success, identity, alignment, held-out collage loss."""
    started = time.monotonic()
    experts = [bench.expert(name) for name in pair]
    composition, trained = _composition(bench, pair, experts, method, out)
    prompts = _prompts(bench, pair)
    with composition:
        pictures = bench.draw(prompts, composition)
    texts = [bench.cards[name]["class"] for name in pair]
    plain = [
        prompt.replace(bench.phrase(pair[0]), texts[0]).replace(bench.phrase(pair[1]), texts[1]) for prompt in prompts
    ]
    aligned = torch.diagonal(bench.alignment.score(pictures, [p for p in plain for _ in range(bench.seeds)]))
    _sheet(pictures, bench.seeds, out / "sheets" / f"{'+'.join(pair)}.{method}.png")
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


def _prompts(bench: Bench, pair: tuple[str, str]) -> list[str]:
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
    config = GateTrainingConfig("demo", steps=bench.steps, validate_every=max(25, bench.steps // 4), **settings)
    named = [
        GateExpert(expert, bench.phrase(name), bench.root / "subjects" / name / "train")
        for expert, name in zip(experts, pair, strict=True)
    ]
    task = build_gate(config, named, out / "work", lambda text: None)
    for step in range(task.total_steps):
        task.step(step)
    path = out / "compositions" / f"{'+'.join(pair)}.{method}.safetensors"
    task.finish(path)
    task.composition.detach()
    bench.pipe = task.pipe
    return task.composition, time.monotonic() - started


def _sheet(pictures: Tensor, columns: int, path: Path) -> None:
    from PIL import Image

    pixels = (pictures.permute(0, 2, 3, 1).numpy() * 255).astype(np.uint8)
    rows = [np.concatenate(list(pixels[i : i + columns]), 1) for i in range(0, len(pixels), columns)]
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.concatenate(rows, 0)).save(path)


def table(out: Path) -> str:
    """All results found below ``out`` as Markdown, with intervals over subjects and pairs."""
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
    found = [json.loads(path.read_text()) for path in sorted((out / "pairs").glob("*.json"))]
    lines += ["", "| method | joint success | identity | alignment | held-out collage loss | pairs | training s |",
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
    return "\n".join([*lines, *forecast_table(out)]) + "\n"


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


def main(args: argparse.Namespace) -> int:
    """Work on what is missing, then write ``table.md``."""
    out: Path = args.out
    if args.threads:
        os.environ["OMP_NUM_THREADS"] = str(args.threads)  # also what gates train with
        torch.set_num_threads(args.threads)
    if args.part != "table":
        bench = Bench(assets_dir() / "demo", args.steps, args.seeds)
        jobs: list[tuple[Path, Any]] = []
        if args.part == "judge":
            for number in args.only or range(len(PAIRS)):
                for path in sorted((out / "pairs").glob(f"{'+'.join(PAIRS[number])}.*.json")):
                    save(path, judge_again(bench, path))
        elif args.part == "forecast":
            jobs = forecast_jobs(bench, out)
        elif args.part == "collapse":
            for path in args.composition:
                jobs.append((out / "collapse" / f"{path.stem}.json",
                             lambda path=path: study_collapse(bench, path, out / "collapse")))  # fmt: skip
        elif args.part == "subjects":
            for number in args.only or range(len(bench.names)):
                name = bench.names[number]
                jobs.append((out / "subjects" / f"{name}.json", lambda name=name: study_subject(bench, name)))
        else:
            for number in args.only or range(len(PAIRS)):
                for method in args.methods:
                    path = out / "pairs" / f"{'+'.join(PAIRS[number])}.{method}.json"
                    jobs.append((path, lambda n=number, m=method: study_pair(bench, PAIRS[n], m, out)))
        for path, job in jobs:
            if not path.exists():
                save(path, job())
    out.mkdir(parents=True, exist_ok=True)
    (out / "table.md").write_text(table(out))
    return 0
