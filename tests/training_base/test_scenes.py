from __future__ import annotations

import numpy as np
import pytest

from training.base.corpus import THING_NAMES
from training.base.scene_pool import SHARD, ScenePool, write_shard
from training.base.scenes import (
    BACKGROUNDS,
    COLOURS,
    GRID,
    PLACES,
    caption_of,
    compose_scene,
    is_withheld_pair,
    paint_background,
    random_scene,
)


def test_the_world_is_as_large_as_promised():
    assert len(set(THING_NAMES)) >= 60 and len(COLOURS) >= 10 and len(PLACES) >= 4
    assert {"person", "robot", "zombie", "alien", "cat", "red apple"} <= set(THING_NAMES)


@pytest.mark.parametrize(
    ("names", "background", "relation", "caption"),
    [
        (("cat",), "green", None, "a cat on a green background"),
        (("cat", "red apple"), "orange", "left of", "a cat left of a red apple on an orange background"),
        (("owl", "umbrella", "bus"), "beach", None, "an owl, an umbrella and a bus on a beach"),
        (("unicorn", "ice cream"), "night", None, "a unicorn and an ice cream at night"),
    ],
)
def test_captions(names, background, relation, caption):
    assert caption_of(names, background, relation) == caption


@pytest.mark.parametrize("background", BACKGROUNDS)
def test_every_background_fills_the_picture_and_repeats_with_its_seed(background):
    first = paint_background(background, 64, np.random.default_rng(3))
    assert first.shape == (64, 64, 3) and np.isfinite(first).all()
    assert (first == paint_background(background, 64, np.random.default_rng(3))).all()
    if background in COLOURS:
        middle = np.median(first.reshape(-1, 3), 0)
        nearest = min(COLOURS, key=lambda name: float(((middle - COLOURS[name]) ** 2).sum()))
        assert nearest == background


def test_relations_hold_in_the_picture(things):
    names = list(things)[:2]
    for seed in range(10):
        for relation, left in (("left of", 0), ("right of", 1)):
            scene = compose_scene(things, names, "white", 64, np.random.default_rng(seed), relation=relation)
            centres = [(thing.box[0] + thing.box[2]) / 2 for thing in scene.things]
            assert centres[left] < centres[1 - left]


def test_without_a_relation_things_stand_in_the_order_of_their_names(things):
    names = list(things)[:3]
    for seed in range(10):
        lefts = [t.box[0] for t in compose_scene(things, names, "white", 64, np.random.default_rng(seed)).things]
        assert lefts == sorted(lefts)


def test_withheld_pairs_never_occur_in_training_scenes(things):
    withheld = [(a, b) for a in things for b in things if a < b and is_withheld_pair(a, b)]
    assert withheld and is_withheld_pair(*withheld[0][::-1])
    rng = np.random.default_rng(0)
    for _ in range(300):
        names = [thing.name for thing in random_scene(things, 32, rng).things]
        assert not any(is_withheld_pair(a, b) for i, a in enumerate(names) for b in names[i + 1 :])


def test_pool_takes_up_new_shards_once(things, tmp_path, monkeypatch):
    monkeypatch.setattr("training.base.scene_pool.SHARD", 8)
    pool = ScenePool(tmp_path)
    assert pool.refresh() == []
    write_shard(tmp_path, 0, things, 32)
    assert [len(shard) for shard in pool.refresh()] == [8]
    (tmp_path / "00001.npy").write_bytes(b"half a shard")
    assert pool.refresh() == [] and len(pool.captions) == 8
    assert pool.take(np.array([3])).shape == (1, 32, 32, 3) and SHARD > 0


@pytest.mark.parametrize("count", [1, 2, 3])
def test_a_thing_has_one_latent_picture(things, count):
    names = list(things)[:count]
    scenes = [compose_scene(things, names, "white", 128, np.random.default_rng(seed)) for seed in range(12)]
    for index in range(count):
        boxes = np.array([scene.things[index].box for scene in scenes])
        assert len({(right - left, bottom - top) for left, top, right, bottom in boxes.tolist()}) == 1
        assert ((boxes - boxes[0]) % GRID == 0).all() and len(np.unique(boxes, axis=0)) <= count
