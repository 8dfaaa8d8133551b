"""The study's tables and its judge of backgrounds; its models are covered by the tests of scoring and of gates."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from mole_diffusion.bases import assets_dir, get_base
from mole_diffusion.scoring.views import load_views
from training.base.scenes import COLOURS, paint_background
from training.study.bench import ground_of
from training.study.judge import SubjectJudge
from training.study.options import METHODS, PAIRS
from training.study.run import table


def test_the_protocol_has_six_pairs_that_cover_eight_subjects():
    assert len(set(PAIRS)) == 6 and len({name for pair in PAIRS for name in pair}) == 8
    assert {"nla", "sum", "static", "sample", "token", "spans"} == set(METHODS)


@pytest.mark.parametrize("colour", COLOURS)
def test_backgrounds_are_recognised_behind_a_subject(colour):
    picture = paint_background(colour, 64, np.random.default_rng(1))
    picture[16:48, 16:48] = (10, 200, 240)
    assert ground_of(torch.from_numpy(picture).permute(2, 0, 1) / 255) == colour


def test_tables_give_intervals_over_pairs_and_paired_differences(tmp_path):
    (tmp_path / "pairs").mkdir()
    for number, pair in enumerate(PAIRS):
        for method, loss in (("nla", 0.5), ("token", 0.4 + 0.01 * number)):
            record = {
                "pair": pair, "method": method, "success": [method == "token", True], "identity": [0.5, 0.7],
                "alignment": [0.2, 0.3], "collage": [loss, loss], "train_seconds": 3.0, "scorer": "a",
                "real_scenes": 0.9,
            }  # fmt: skip
            (tmp_path / "pairs" / f"{'+'.join(pair)}.{method}.json").write_text(json.dumps(record))
    (tmp_path / "subjects").mkdir()
    record = {
        "subject": "robot", "identity": {"mean": 0.6, "low": 0.5, "high": 0.7}, "floor": 0.1, "ceiling": 0.9,
        "success": 1.0, "real_scenes": 0.9, "background_kept": 0.9, "background_base": 0.95,
    }  # fmt: skip
    (tmp_path / "subjects" / "robot.json").write_text(json.dumps(record))
    text = table(tmp_path)
    assert "| robot | 0.600 [0.500, 0.700] | 0.100 | 0.900 | 1.00 (0.90) | 0.90 (0.95) |" in text
    assert "| nla | 0.500 [0.500, 0.500] |" in text and "| token | 1.000 [1.000, 1.000] |" in text
    assert "- collage loss, token minus nla: -0.075" in text and "- joint success, token minus nla: 0.500" in text
    assert "Several judges" not in text
    other = tmp_path / "pairs" / "robot+zombie.nla.json"
    other.write_text(json.dumps(json.loads(other.read_text()) | {"scorer": "b"}))
    assert "Several judges" in table(tmp_path)


@pytest.mark.parametrize("count", [pytest.param(1, marks=pytest.mark.long), 2])
def test_the_judge_finds_real_subjects_as_the_base_shows_them_and_nothing_in_bare_grounds(count):
    base = get_base("demo")
    folders = sorted((assets_dir() / "demo" / "subjects").glob("*/heldout"))[:4]
    views = {folder.parent.name: load_views(folder) for folder in folders}
    posed = {folder.parent.name: load_views(folder.parent / "train") for folder in folders}
    judge = SubjectJudge(base, base.load(), views, posed, count, each=6)
    assert judge.success > 0.4 and judge.ceilings.mean() > judge.thresholds.mean()
    bare = (
        torch.from_numpy(paint_background("green", 64, np.random.default_rng(0)) / 255).float().permute(2, 0, 1)[None]
    )
    assert not judge.find(judge.scores(judge.as_base(bare)), [tuple(range(count))]).success.any()
