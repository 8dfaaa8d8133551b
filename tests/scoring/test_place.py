from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torchvision.transforms.functional import to_tensor

from mole_diffusion.errors import InvalidRequest
from mole_diffusion.scoring.place import crops, embed_places, overlap, place_scores, subject_score, windows
from mole_diffusion.scoring.views import Gallery
from tests.tiny import cut_out


class ColourIdentity:
    """Likeness of colours, off from grey: enough to tell drawn subjects apart exactly."""

    label = "mean colour"
    size = 16

    def embed(self, images: Tensor) -> Tensor:
        small = torch.nn.functional.adaptive_avg_pool2d(images, 4).flatten(1) - 0.5
        return torch.nn.functional.normalize(small + 1e-6, dim=1)


def _view(colour: str) -> Tensor:
    return to_tensor(cut_out(colour))


def _scene(*things: tuple[str, int, int, int]) -> Tensor:
    scene = torch.full((3, 64, 64), 0.5)
    for colour, left, top, side in things:
        picture = torch.nn.functional.interpolate(_view(colour)[None], (side, side), mode="bilinear", antialias=True)[0]
        area = scene[:, top : top + side, left : left + side]
        area.mul_(1 - picture[3:]).add_(picture[:3] * picture[3:])
    return scene


def test_windows_are_squares_that_reach_every_edge() -> None:
    boxes = windows(64, 96)
    sides = boxes[:, 2:] - boxes[:, :2]
    torch.testing.assert_close(sides[:, 0], sides[:, 1])
    assert {round(float(side), 1) for side in sides[:, 0]} == {25.6, 32.0, 38.4, 44.8, 51.2}
    assert float(boxes.min()) == 0 and float(boxes[:, 2].max()) == pytest.approx(96)
    assert float(boxes[:, 3].max()) == pytest.approx(64)
    corners = boxes[sides[:, 0] == 32][:, 0].unique()
    assert float(corners.diff().max()) <= 8


def test_a_window_of_the_whole_picture_is_one() -> None:
    assert windows(32, 32, scales=(1.0,)).tolist() == [[0, 0, 32, 32]]
    with pytest.raises(InvalidRequest, match="scales"):
        windows(32, 32, scales=(1.5,))


def test_crops_cut_what_the_boxes_say_picture_by_picture() -> None:
    images = torch.rand(2, 3, 32, 32)
    cut = crops(images, torch.tensor([[0.0, 0, 16, 16], [8, 16, 24, 32]]), 16)
    torch.testing.assert_close(cut[0], images[0, :, :16, :16])
    torch.testing.assert_close(cut[3], images[1, :, 16:32, 8:24])


def test_chunks_do_not_change_the_features() -> None:
    images, boxes = torch.rand(5, 3, 64, 64), windows(64, 64)
    whole = embed_places(images, boxes, ColourIdentity())
    torch.testing.assert_close(whole, embed_places(images, boxes, ColourIdentity(), chunk=7))
    assert whole.shape == (5, len(boxes), 48)


@pytest.mark.parametrize("place", [(4, 6, 30), (30, 24, 30), (10, 10, 44)])
def test_a_subject_is_found_where_it_stands(place: tuple[int, int, int]) -> None:
    left, top, side = place
    score, box = subject_score(_scene(("red", left, top, side)), [_view("red")], ColourIdentity())
    centre = ((box[0] + box[2]) / 2, (box[1] + box[3]) / 2)
    assert score > 0.7
    assert centre == pytest.approx((left + side / 2, top + side / 2), abs=6)


def test_a_picture_without_the_subject_scores_lower() -> None:
    views, scorer = [_view("red")], ColourIdentity()
    with_it, _ = subject_score(_scene(("red", 4, 6, 30)), views, scorer)
    without, _ = subject_score(_scene(("blue", 4, 6, 30)), views, scorer)
    assert with_it > without + 0.2


def test_scores_name_the_right_subject_in_each_place() -> None:
    gallery = Gallery.build({"red": [_view("red")], "blue": [_view("blue")]}, ColourIdentity())
    boxes = windows(64, 64)
    scores = place_scores(_scene(("red", 0, 16, 30), ("blue", 34, 16, 30))[None], gallery, ColourIdentity(), boxes)
    assert scores.shape == (1, len(boxes), 2)
    red, blue = (boxes[int(scores[0, :, index].argmax())] for index in range(2))
    assert float(red[2]) < 40 and float(blue[0]) > 24


def test_overlap_is_of_the_smaller_box() -> None:
    shared = overlap(torch.tensor([[0.0, 0, 10, 10], [2, 2, 6, 6], [5, 0, 15, 10], [20, 20, 30, 30]]))
    assert shared[0].tolist() == [1, 1, 0.5, 0]
    torch.testing.assert_close(shared, shared.T)
