"""Collages: captions name what is there, in an order that says nothing about places; masks are what is visible."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from mole_diffusion.bases import get_base
from mole_diffusion.errors import InvalidRequest
from tests.tiny import cut_out as shape
from training.base.scenes import COLOURS, EXTENTS, GRID, PLACES
from training.data.backgrounds import background, random_background
from training.data.masks import border_saliency, choose_mask, cut_out, plausible, rough_mask, threshold
from training.data.paste import Placement, fit, paste, to_tensor
from training.data.subjects import Subject, crop_to_mask, subject_phrase
from training.objectives.collage import CollageConfig, Scene, make_scene, subject_cutouts

PHRASES = ("zwx robot", "vyq alien", "kkj bunny")
PAINT = ("#ff0000", "#00ff00", "#0000ff")
SIZE = 64


@pytest.fixture(scope="module")
def cutouts() -> list[list[Image.Image]]:
    return [[crop_to_mask(shape(colour, turn=turn)) for turn in (0.0, 20.0)] for colour in PAINT]


def scenes(cutouts: list[list[Image.Image]], count: int, subjects: int = 2, **options: float) -> list[Scene]:
    config = CollageConfig(**options)  # type: ignore[arg-type]
    return [
        make_scene(cutouts[:subjects], PHRASES[:subjects], SIZE, np.random.default_rng([seed]), config)
        for seed in range(count)
    ]


def test_captions_name_exactly_what_is_visible(cutouts: list[list[Image.Image]]) -> None:
    for scene in scenes(cutouts, 60, 3):
        visible = {number for number in range(3) if scene.masks[number].sum() > 0}
        named = {number for number in range(3) if PHRASES[number] in scene.prompt}
        assert visible == named == set(scene.named)
        positions = [scene.prompt.index(PHRASES[number]) for number in scene.named]
        assert positions == sorted(positions)
        related = " left of " in scene.prompt or " right of " in scene.prompt
        assert scene.prompt.count(" and ") == (len(scene.named) > 1 and not related)
        assert scene.prompt.count(", ") == max(len(scene.named) - 2, 0)


def test_place_is_independent_of_the_order_in_the_prompt(cutouts: list[list[Image.Image]]) -> None:
    drawn = scenes(cutouts, 400, single=0.0, relation=0.0)
    first_left = np.mean([scene.places[0] < scene.places[1] for scene in drawn])
    zero_first = np.mean([scene.named[0] == 0 for scene in drawn])
    zero_left = np.mean([scene.places[scene.named.index(0)] < scene.places[scene.named.index(1)] for scene in drawn])
    for share in (first_left, zero_first, zero_left):
        assert 0.4 < share < 0.6


def test_relations_in_captions_are_true(cutouts: list[list[Image.Image]]) -> None:
    for scene in scenes(cutouts, 40, single=0.0, relation=1.0):
        left = scene.places[0] < scene.places[1]
        assert (" left of " in scene.prompt) == left and (" right of " in scene.prompt) != left


def test_on_slots_the_first_in_the_prompt_stands_left(cutouts: list[list[Image.Image]]) -> None:
    drawn = scenes(cutouts, 40, single=0.0, relation=0.5, on_slots=True)
    assert all(scene.places == tuple(sorted(scene.places)) and " right of " not in scene.prompt for scene in drawn)
    assert 0.2 < np.mean([scene.named[0] == 0 for scene in drawn]) < 0.8


def test_masks_are_disjoint_visible_parts(cutouts: list[list[Image.Image]]) -> None:
    for scene in scenes(cutouts, 30, 3, single=0.0):
        assert scene.masks.min() >= 0 and scene.masks.sum(0).max() <= 1 + 1e-5
        for number in scene.named:
            sure = scene.masks[number] > 0.98
            colour = torch.tensor([int(PAINT[number][at : at + 2], 16) / 255 for at in (1, 3, 5)])
            pixels = scene.picture[:, sure]
            painted = (pixels - colour[:, None]).abs().amax(0) < 0.2
            eye = pixels.amin(0) > 0.5
            assert (painted | eye).float().mean() > 0.85


def test_occlusion_happens_but_leaves_enough(cutouts: list[list[Image.Image]]) -> None:
    covered = 0
    for scene in scenes(cutouts, 40, 2, single=0.0):
        areas = [float(scene.masks[number].sum()) for number in scene.named]
        assert min(areas) > 0.03 * SIZE * SIZE
        soft = scene.masks.sum(0)
        covered += bool(((scene.masks > 0.05).sum(0) > 1).any() and soft.max() > 0.5)
    assert covered > 3


def test_single_subject_scenes_happen_and_can_be_switched_off(cutouts: list[list[Image.Image]]) -> None:
    alone = [len(scene.named) == 1 for scene in scenes(cutouts, 100, single=0.3)]
    assert 15 < sum(alone) < 45
    assert all(len(scene.named) == 2 for scene in scenes(cutouts, 20, single=0.0))


def test_same_seed_gives_the_same_scene(cutouts: list[list[Image.Image]]) -> None:
    one, two = (scenes(cutouts, 3)[2] for _ in range(2))
    assert torch.equal(one.picture, two.picture) and one.prompt == two.prompt and torch.equal(one.masks, two.masks)


def test_subject_without_cutouts_is_refused_with_a_way_out() -> None:
    photo = Subject("mug", "zwx mug", (Image.new("RGB", (32, 32)),))
    with pytest.raises(InvalidRequest, match="transparent background"):
        subject_cutouts(photo)


def test_pasted_edges_hold_no_halo() -> None:
    layer = fit(shape("#ff0000"), 64, Placement(0.5, 0.5, 0.8, blur=0.8))
    picture, visible = paste(Image.new("RGB", (64, 64), "#ff0000"), [layer])
    pixels = np.asarray(picture).astype(int)
    assert visible.shape == (1, 64, 64)
    assert pixels[..., 0].min() > 235  # red on red stays red: no dark rim from what lies outside the mask


def test_cutout_at_the_edge_is_cropped() -> None:
    layer = fit(shape("red"), 64, Placement(0.0, 1.0, 0.9))
    assert layer.size == (64, 64) and np.asarray(layer)[0:10, 40:].max() == 0


@pytest.mark.parametrize("colour", COLOURS)
def test_backgrounds_have_the_colour_they_are_named_by(colour: str) -> None:
    table = np.array(list(COLOURS.values()), float)
    for seed in range(4):
        drawn = background(colour, 32, np.random.default_rng(seed))
        mean = np.asarray(drawn.picture, float).mean((0, 1))
        assert list(COLOURS)[int(np.linalg.norm(table - mean, axis=1).argmin())] == colour
        assert colour in drawn.phrase


def test_places_are_named_as_the_base_knows_them() -> None:
    rng = np.random.default_rng(0)
    assert random_background(16, rng, places=1.0).phrase in PLACES.values()
    assert random_background(16, rng, places=0.0).phrase.endswith("background")


def test_rough_mask_is_a_third_around_the_attention() -> None:
    heat = np.zeros((32, 32))
    heat[4:12, 20:28] = 1
    mask = rough_mask((32, 32), heat)
    assert abs(mask.mean() - 1 / 3) < 0.02 and mask[8, 24] and not mask[30, 2]
    assert rough_mask((32, 32), None)[16, 16] and not rough_mask((32, 32), None)[0, 0]


@pytest.mark.parametrize(
    ("trigger", "class_name", "phrase"),
    [
        ("zwx", "robot", "zwx robot"),
        ("zwx robot", "robot", "zwx robot"),
        ("zwx", "", "zwx"),
        (None, "robot", "robot"),
        ("zwx robotic", "robot", "zwx robotic robot"),
        ("red zwx Alien toy", "alien toy", "red zwx Alien toy"),
    ],
)
def test_subject_phrase(trigger: str | None, class_name: str, phrase: str) -> None:
    assert subject_phrase(trigger, class_name) == phrase


def test_subject_phrase_needs_a_word() -> None:
    with pytest.raises(InvalidRequest, match="trigger or a class"):
        subject_phrase(" ", None)


def test_saliency_cuts_a_subject_out_of_a_gradient() -> None:
    blue = background("blue", 64, np.random.default_rng(1)).picture
    layer = fit(shape("red"), 64, Placement(0.45, 0.5, 0.7))
    picture, visible = paste(blue, [layer])
    mask = choose_mask(picture)
    assert mask is not None
    truth = visible[0] > 0.5
    assert (mask & truth).sum() / (mask | truth).sum() > 0.85
    cut = cut_out(picture, mask)
    assert cut.mode == "RGBA" and np.asarray(cut)[..., 3][~mask].max() == 0


def test_attention_decides_where_saliency_sees_nothing() -> None:
    picture = background("green", 64, np.random.default_rng(2)).picture
    heat = np.zeros((64, 64), np.float32)
    heat[20:44, 20:44] = 1
    assert not plausible(threshold(border_saliency(picture), floor=0.06))
    mask = choose_mask(picture, heat)
    assert mask is not None and 0.1 < mask.mean() < 0.2
    assert choose_mask(picture) is None


def test_saliency_that_contradicts_attention_is_not_used() -> None:
    layer = fit(shape("red"), 64, Placement(0.25, 0.5, 0.4))
    picture, _ = paste(background("white", 64, np.random.default_rng(0)).picture, [layer])
    heat = np.zeros((64, 64), np.float32)
    heat[20:40, 40:60] = 1
    mask = choose_mask(picture, heat)
    assert mask is not None and mask[30, 50] and not mask[30, 16]


def test_pictures_become_tensors_in_unit_range() -> None:
    tensor = to_tensor(Image.new("RGB", (4, 2), (255, 0, 51)))
    assert tensor.shape == (3, 2, 4) and torch.allclose(tensor[:, 0, 0], torch.tensor([1.0, 0.0, 0.2]))


def test_demo_collages_stay_where_the_demo_base_draws(cutouts: list[list[Image.Image]]) -> None:
    config = CollageConfig.of(get_base("demo"), single=0)
    assert not config.flip and CollageConfig.of(get_base("sd21"), single=0) == CollageConfig(single=0)
    for seed in range(10):
        scene = make_scene(cutouts[:2], PHRASES[:2], SIZE, np.random.default_rng(seed), config)
        assert all(place * SIZE % GRID == 0 for place in scene.places)
        tall = max(int(torch.where(scene.masks[n] > 0.5)[0].diff().abs().sum()) for n in scene.named)
        assert tall <= EXTENTS[2] * SIZE + 1
