"""The square of a photo keeps its subject."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageOps

from training.data.crop import crop_square, salient_box, square_box


def photo(width: int, height: int, box: tuple[int, int, int, int]) -> Image.Image:
    """A red ellipse on a soft gradient."""
    ramp = np.linspace(120, 160, width, dtype=np.float32)[None, :, None] * np.ones((height, 1, 3), np.float32)
    picture = Image.fromarray(ramp.astype(np.uint8))
    ImageDraw.Draw(picture).ellipse(box, fill="#d01010")
    return picture


def test_box_is_that_of_the_subject() -> None:
    found = salient_box(photo(600, 300, (450, 80, 570, 240)))
    assert found is not None and found == pytest.approx((450, 80, 570, 240), abs=12)
    assert salient_box(Image.new("RGB", (600, 300), "grey")) is None


@pytest.mark.parametrize("box", [(450, 80, 570, 240), (10, 60, 150, 220), (250, 60, 390, 240)])
@pytest.mark.parametrize("upright", [False, True])
def test_whole_subject_stays_in_the_square(box: tuple[int, int, int, int], upright: bool) -> None:
    picture = photo(600, 300, box)
    square = crop_square(picture.transpose(Image.Transpose.ROTATE_90) if upright else picture, 100)
    pixels = np.asarray(square, np.int16)
    red = (pixels[..., 0] - pixels[..., 1] > 90).sum() * 9
    whole = np.asarray(picture, np.int16)
    assert square.size == (100, 100)
    assert red == pytest.approx((whole[..., 0] - whole[..., 1] > 90).sum(), rel=0.06)


def test_the_middle_where_nothing_stands_out() -> None:
    plain = Image.fromarray(np.random.default_rng(0).integers(100, 140, (60, 100, 3), np.uint8))
    fitted = ImageOps.fit(plain, (32, 32), Image.Resampling.LANCZOS)
    assert np.array_equal(np.asarray(crop_square(plain, 32)), np.asarray(fitted))


def test_squares_stay_inside() -> None:
    assert square_box((600, 300), (560, 0, 600, 300)) == (300, 0, 600, 300)
    assert square_box((600, 300), (0, 0, 600, 300)) == (150, 0, 450, 300)  # a wide subject: its middle
    assert square_box((300, 600), (0, 0, 300, 90)) == (0, 0, 300, 300)
    assert square_box((80, 80), None) == (0, 0, 80, 80)
