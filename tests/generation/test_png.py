from __future__ import annotations

import struct
import zlib
from pathlib import Path

import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from mole_diffusion.errors import InvalidFile
from mole_diffusion.png import KEY, read_parameters, save_png

PARAMETERS = {"prompt": 'ein Häschen 🐰 "quoted"', "seed": 7, "scores": [{"prompt": 0.25}], "composition": None}


def _picture(path: Path, text: str | None = None) -> Path:
    info = PngInfo()
    if text is not None:
        info.add_text(KEY, text)
    Image.new("RGB", (4, 4)).save(path, pnginfo=info)
    return path


def test_parameters_survive(tmp_path: Path) -> None:
    image = Image.effect_noise((32, 24), 50).convert("RGB")
    path = save_png(image, tmp_path / "new" / "a.png", PARAMETERS)
    assert read_parameters(path) == PARAMETERS
    with Image.open(path) as again:
        assert again.tobytes() == image.tobytes()
    assert [file.name for file in path.parent.iterdir()] == ["a.png"]


def test_a_failed_write_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="cannot write mode"):
        save_png(Image.new("CMYK", (4, 4)), tmp_path / "a.png", PARAMETERS)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("text", "reason"), [(None, "carries no parameters"), ("{", "damaged"), ("[1]", "table of settings")]
)
def test_pictures_without_our_parameters_are_refused(tmp_path: Path, text: str | None, reason: str) -> None:
    with pytest.raises(InvalidFile, match=reason):
        read_parameters(_picture(tmp_path / "a.png", text))


def test_other_files_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"GIF89a" + bytes(40))
    with pytest.raises(InvalidFile, match="Expected a PNG"):
        read_parameters(tmp_path / "a.png")
    with pytest.raises(InvalidFile, match="cannot be read"):
        read_parameters(tmp_path / "absent.png")
    whole = _picture(tmp_path / "b.png", "{}").read_bytes()
    (tmp_path / "c.png").write_bytes(whole[:40])
    with pytest.raises(InvalidFile, match=r"damaged|no parameters"):
        read_parameters(tmp_path / "c.png")


def test_a_huge_picture_is_refused_before_it_is_decoded(tmp_path: Path) -> None:
    header = struct.pack(">IIBBBBB", 12000, 12000, 8, 2, 0, 0, 0)
    chunk = b"IHDR" + header
    data = b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + chunk + struct.pack(">I", zlib.crc32(chunk))
    (tmp_path / "a.png").write_bytes(data)
    with pytest.raises(InvalidFile, match="12000×12000"):
        read_parameters(tmp_path / "a.png")


def test_a_compressed_text_bomb_is_refused(tmp_path: Path) -> None:
    info = PngInfo()
    info.add_text(KEY, "0" * (8 * 2**20), zip=True)
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png", pnginfo=info)
    with pytest.raises(InvalidFile, match="damaged"):
        read_parameters(tmp_path / "a.png")
