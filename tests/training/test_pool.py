"""The pool of cheap experts and the router's study: what they are made of, how results become a table."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mole_diffusion.errors import InvalidRequest
from training.base.corpus import _ALIASES, THING_NAMES
from training.base.subjects import SUBJECTS
from training.study import pool, router
from training.study.options import PAIRS


def test_the_pool_is_unknown_to_the_base_and_to_the_study(tmp_path: Path) -> None:
    labels, classes = zip(*pool.THINGS, strict=True)
    assert len(set(map(pool.slug, labels))) == len(labels) >= 40
    assert not set(labels) & {_ALIASES.get(name, name) for name in THING_NAMES}
    assert set(classes) <= set(THING_NAMES)
    tokens = pool._tokens(len(labels))
    assert len(set(tokens)) == len(tokens) and not set(tokens) & {subject.token for subject in SUBJECTS}
    assert tokens == pool._tokens(len(labels))
    paths = [path for path, _ in pool.jobs(tmp_path, None)]
    assert paths[0] == tmp_path / "pool" / "prince.json" and len(set(paths)) == len(labels)
    assert [path for path, _ in pool.jobs(tmp_path, [29])] == [tmp_path / "pool" / "mrs-claus.json"]


def test_without_the_corpus_it_says_how_to_get_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pool, "CORPUS", tmp_path)
    with pytest.raises(InvalidRequest, match="training base --stages scenes"):
        pool.picture_of("prince")


def test_without_a_router_it_says_how_to_train_one(tmp_path: Path) -> None:
    bench: Any = None
    with pytest.raises(InvalidRequest, match="python -m training router --base demo --experts"):
        router.jobs(bench, tmp_path, None)
    file = router.router_file(tmp_path)
    file.parent.mkdir()
    file.touch()
    assert len(router.jobs(bench, tmp_path, [1, 2])) == 2 * (1 + len(router.BESIDE))


def test_table_pairs_pictures_with_pictures(tmp_path: Path) -> None:
    recipe = {"experts": 40, "steps": 600, "held_out_loss": 0.1, "nla_loss": 0.2, "spans_loss": 0.15}
    for folder, method, level in (("router", "router", 0.75), ("pairs", "nla", 0.25), ("pairs", "token", 0.5)):
        (tmp_path / folder).mkdir(exist_ok=True)
        for pair in PAIRS[:3]:
            count = 2 if method == "token" else 4  # other pictures: not compared one by one
            values = np.full(count, level).tolist()
            record = {
                "pair": list(pair), "method": method, "success": values, "identity": values, "collage": values,
                "train_seconds": 60.0 if method == "token" else 0.0, "recipe": recipe,
                "scorer": "a", "real_scenes": 0.8,
            }  # fmt: skip
            name = "+".join(pair) + ("" if folder == "router" else f".{method}")
            (tmp_path / folder / f"{name}.json").write_text(json.dumps(record))
    text = "\n".join(router.table(tmp_path))
    assert "Router over 40 experts, 600 steps" in text and "0.1000, NLA 0.2000, trigger spans 0.1500" in text
    assert [line.split(" | ")[4:6] for line in text.splitlines() if line.startswith("| token")] == [["3", "6"]]
    assert "- joint success, router minus nla: 0.500" in text and "minus token" not in text
    other = tmp_path / "pairs" / f"{'+'.join(PAIRS[0])}.nla.json"
    other.write_text(json.dumps(json.loads(other.read_text()) | {"scorer": "b"}))
    assert "Several judges" in router.table(tmp_path)[-1]
    assert router.table(tmp_path / "none") == []
