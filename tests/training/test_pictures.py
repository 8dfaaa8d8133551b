"""Reading users' pictures: limits, damage, transparency, augmentation."""

from __future__ import annotations

import resource
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from mole_diffusion.errors import InvalidRequest
from tests.tiny import cut_out
from training.data.augment import augment
from training.data.duplicates import difference_hash, near_duplicates
from training.data.pictures import Limits, check_pictures, has_mask, read_picture, read_pictures
from training.data.views import _columns


def test_reads_cutouts_and_photos_by_name(tmp_path: Path) -> None:
    cut_out("red").save(tmp_path / "b.png")
    Image.new("RGB", (40, 30), "blue").save(tmp_path / "a.JPG", "JPEG")
    Image.new("RGBA", (20, 20), (1, 2, 3, 255)).save(tmp_path / "c.webp")
    (tmp_path / "notes.txt").write_text("not a picture")
    pictures = read_pictures(tmp_path)
    assert [picture.mode for picture in pictures] == ["RGB", "RGBA", "RGB"]
    assert [has_mask(picture) for picture in pictures] == [False, True, False]


def test_exif_rotation_is_applied_and_dropped(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (40, 20)).save(tmp_path / "a.jpg", exif=exif)
    picture = read_picture(tmp_path / "a.jpg")
    assert picture.size == (20, 40) and "exif" not in picture.info


def test_missing_and_empty_folders(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match="not a folder"):
        read_pictures(tmp_path / "none")
    with pytest.raises(InvalidRequest, match="no picture"):
        read_pictures(tmp_path)


def test_limits(tmp_path: Path) -> None:
    Image.new("RGB", (64, 64)).save(tmp_path / "a.png")
    Image.new("RGB", (64, 64)).save(tmp_path / "b.png")
    with pytest.raises(InvalidRequest, match="at most 1"):
        read_pictures(tmp_path, Limits(count=1))
    with pytest.raises(InvalidRequest, match="MB"):
        read_picture(tmp_path / "a.png", Limits(file_size=10))
    with pytest.raises(InvalidRequest, match="64×64 pixels; at most"):
        read_picture(tmp_path / "a.png", Limits(pixels=1000))
    with pytest.raises(InvalidRequest, match="each side needs"):
        read_picture(tmp_path / "a.png", Limits(shortest_side=65))


def test_damaged_pictures(tmp_path: Path) -> None:
    (tmp_path / "text.png").write_text("hello")
    Image.effect_noise((64, 64), 50).save(tmp_path / "cut.png")
    data = (tmp_path / "cut.png").read_bytes()
    (tmp_path / "cut.png").write_bytes(data[: len(data) // 2])
    Image.new("RGB", (32, 32)).save(tmp_path / "gif.png", "GIF")
    for name in ("text.png", "cut.png", "gif.png"):
        with pytest.raises(InvalidRequest, match=f"{name} cannot be read"):
            read_picture(tmp_path / name)


def test_bomb_is_refused_from_its_header(tmp_path: Path) -> None:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    (tmp_path / "bomb.png").write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", b""))
    with pytest.raises(InvalidRequest):
        read_picture(tmp_path / "bomb.png")


def test_a_huge_picture_is_refused_without_decoding_it(tmp_path: Path) -> None:
    side, row = 20_000, b"\0" * 2501  # one bit a pixel: 50 MB as rows, 1.2 GB as RGB
    chunks = [(b"IHDR", struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0)), (b"IDAT", zlib.compress(row * side, 1))]
    data = b"".join(
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        for kind, body in [*chunks, (b"IEND", b"")]
    )
    (tmp_path / "huge.png").write_bytes(b"\x89PNG\r\n\x1a\n" + data)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(InvalidRequest, match=r"(cannot be read|too many pixels)"):
        read_picture(tmp_path / "huge.png")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 20_000  # KiB


def test_corrupt_jpeg_and_500_pictures(tmp_path: Path) -> None:
    Image.effect_noise((64, 64), 50).save(tmp_path / "a.jpg")
    data = (tmp_path / "a.jpg").read_bytes()
    (tmp_path / "a.jpg").write_bytes(data[: len(data) // 2])
    with pytest.raises(InvalidRequest, match=r"a\.jpg cannot be read as a picture"):
        check_pictures(tmp_path)
    for number in range(500):
        (tmp_path / f"{number}.png").write_bytes(b"")
    with pytest.raises(InvalidRequest, match="501 pictures; keep at most 200"):
        check_pictures(tmp_path)


def test_large_pictures_are_kept_no_larger_than_training_needs(tmp_path: Path) -> None:
    Image.new("RGB", (90, 60)).save(tmp_path / "a.png")
    assert read_picture(tmp_path / "a.png", Limits(kept_side=40)).size == (60, 40)


def test_owners_are_told_of_duplicates_and_counts(tmp_path: Path) -> None:
    noise = Image.effect_noise((12, 12), 90).resize((96, 96), Image.Resampling.BICUBIC)
    noise.convert("RGB").save(tmp_path / "a.png")
    noise.convert("RGB").save(tmp_path / "b.jpg", quality=60)
    noise.rotate(90).convert("RGB").save(tmp_path / "c.png")
    found = check_pictures(tmp_path)
    assert found.names == ("a.png", "b.jpg", "c.png") and len(found.pictures) == 3
    assert found.warnings == (
        "3 pictures were given; 4 to 20 different ones usually serve best.",
        "a.png, b.jpg are nearly the same picture: keep one of them.",
    )
    noise.rotate(180).convert("RGB").save(tmp_path / "d.png")
    assert len(check_pictures(tmp_path).warnings) == 1


def test_difference_hash_is_that_of_its_definition() -> None:
    ramp = Image.fromarray(np.tile(np.arange(9, dtype=np.uint8) * 20, (8, 1)))
    assert difference_hash(ramp) == 0 and difference_hash(ImageOps.mirror(ramp)) == 2**64 - 1
    assert near_duplicates([ramp, ImageOps.mirror(ramp), ramp]) == [(0, 2)]


def test_cutouts_are_augmented_on_backgrounds_named_in_captions() -> None:
    made = [augment(cut_out("red"), "zwx robot", 64, np.random.default_rng(n)) for n in range(40)]
    captions = {item.caption for item in made}
    assert all(item.picture.shape == (3, 64, 64) for item in made)
    assert "a zwx robot" in captions and len(captions) > 5
    assert all(caption.startswith("a zwx robot") for caption in captions)
    red = [(item.picture[0] - item.picture[1] > 0.5).float().mean() for item in made]
    assert min(red) > 0.03


def test_demo_subjects_stand_where_demo_things_stand() -> None:
    square = Image.new("RGBA", (32, 32), "red")
    square.putalpha(255)
    square.putpixel((0, 0), (0, 0, 0, 0))
    for seed in range(12):
        made = augment(square, "zwx robot", 64, np.random.default_rng(seed), on_slots=True)
        red = made.picture[0] - made.picture[1:].amax(0) > 0.9
        rows, columns = (torch.where(red.any(axis))[0] for axis in (1, 0))
        assert len(rows) in range(27, 31) or len(rows) in range(42, 46)
        assert all(abs((float(side.float().mean()) + 0.5) / 8 % 1 - 0.5) > 0.35 for side in (rows, columns))
        low, high = made.counted
        assert low <= (float(columns.float().mean()) + 0.5) / 64 <= high
        assert (high - low == 0.5) == (len(rows) < 40) == (" and " in made.caption)
        if high - low == 0.5:  # the order of the words is that of the places
            assert made.caption.startswith("a zwx robot and ") == (low == 0)


def test_photos_are_cropped_and_mirrored_only_if_allowed() -> None:
    photo = Image.new("RGB", (100, 60), "black")
    photo.paste("white", (50, 0, 100, 60))
    plain = [augment(photo, "zwx mug", 32, np.random.default_rng(n), flip=False) for n in range(8)]
    assert all(item.picture[:, :, -1].min() == 1 for item in plain)
    assert plain[0].caption == "a photo of a zwx mug"
    mirrored = [augment(photo, "zwx mug", 32, np.random.default_rng(n), flip=True) for n in range(16)]
    assert {0.0, 1.0} == {item.picture[0, 0, 0].item() for item in mirrored}


def test_nothing_is_mirrored_unless_it_is_asked_for() -> None:
    written = Image.new("RGBA", (64, 64), "#00ffff")  # no background has these two colours
    written.paste("#ff00ff", (32, 0, 64, 64))
    written.putpixel((0, 0), (0, 0, 0, 0))
    for seed in range(12):
        red, green, blue = augment(written, "zwx sign", 64, np.random.default_rng(seed)).picture
        left = ((red < 0.1) & (green > 0.9) & (blue > 0.9)).nonzero()[:, 1].float().mean()
        right = ((red > 0.9) & (green < 0.1) & (blue > 0.9)).nonzero()[:, 1].float().mean()
        assert left < right


def test_half_of_a_picture_counts_as_much_as_a_whole_one() -> None:
    assert _columns(8, (0.5, 1.0)).flatten().tolist() == [0, 0, 0, 0, 2, 2, 2, 2]
    assert _columns(8, (0.0, 1.0)).flatten().tolist() == [1] * 8
