"""Reading a folder of pictures that a user gave: counted, measured before decoding, re-encoded in memory."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageOps, UnidentifiedImageError

from mole_diffusion.errors import InvalidRequest
from training.data.duplicates import near_duplicates

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
ADVISED = (4, 20)
"""Pictures of one subject from which and up to which more of them help."""


@dataclass(frozen=True)
class Limits:
    """What is accepted; sides in pixels, sizes in bytes."""

    count: int = 200
    file_size: int = 20 * 2**20
    pixels: int = 25_000_000
    shortest_side: int = 16
    kept_side: int = 2048
    """Larger pictures are scaled down until their shorter side has this many pixels: no training needs more."""


@dataclass(frozen=True)
class Checked:
    """A folder's pictures in the order of their names, and what its owner should know about them, one sentence each."""

    names: tuple[str, ...]
    pictures: tuple[Image.Image, ...]
    warnings: tuple[str, ...] = ()


def check_pictures(folder: Path, limits: Limits = Limits(), advised: tuple[int, int] = ADVISED) -> Checked:
    """Read and look over a folder of pictures. Raises InvalidRequest, as :func:`read_pictures`."""
    paths = _paths(folder, limits)
    pictures = [read_picture(path, limits) for path in paths]
    names = tuple(path.name for path in paths)
    warnings = [f"{', '.join(names[n] for n in group)} are nearly the same picture: keep one of them." for group in
                near_duplicates(pictures)]  # fmt: skip
    low, high = advised
    if not low <= len(names) <= high:
        warnings.insert(0, f"{len(names)} pictures were given; {low} to {high} different ones usually serve best.")
    return Checked(names, tuple(pictures), tuple(warnings))


def read_pictures(folder: Path, limits: Limits = Limits()) -> list[Image.Image]:
    """The folder's pictures by name: RGBA where a picture has transparent parts, else RGB. Raises InvalidRequest."""
    return [read_picture(path, limits) for path in _paths(folder, limits)]


def _paths(folder: Path, limits: Limits) -> list[Path]:
    if not folder.is_dir():
        raise InvalidRequest(f"Expected a folder of pictures, but {folder} is not a folder.")
    paths = sorted(path for path in folder.iterdir() if path.is_file() and path.suffix.lower() in SUFFIXES)
    if not paths:
        raise InvalidRequest(f"{folder} holds no picture; put PNG, JPEG or WebP files there.")
    if len(paths) > limits.count:
        raise InvalidRequest(f"{folder} holds {len(paths)} pictures; keep at most {limits.count}.")
    return paths


def read_picture(path: Path, limits: Limits = Limits()) -> Image.Image:
    """One picture, upright, without metadata. Raises InvalidRequest for anything unreadable or too large."""
    size = path.stat().st_size
    if size > limits.file_size:
        raise InvalidRequest(f"{path.name} has {size / 2**20:.0f} MB; at most {limits.file_size / 2**20:.0f} are read.")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path, formats=("PNG", "JPEG", "WEBP")) as picture:
                _check_size(path, picture.size, limits)
                return _scaled(_clean(ImageOps.exif_transpose(picture)), limits.kept_side)
    except (OSError, SyntaxError, ValueError, UnidentifiedImageError, Image.DecompressionBombError) as error:
        raise InvalidRequest(f"{path.name} cannot be read as a picture ({error}); save it again as PNG.") from error
    except (Image.DecompressionBombWarning, MemoryError) as error:
        raise InvalidRequest(f"{path.name} has too many pixels; at most {limits.pixels:,} are read.") from error


def _check_size(path: Path, size: tuple[int, int], limits: Limits) -> None:
    width, height = size
    if width * height > limits.pixels:
        raise InvalidRequest(f"{path.name} has {width}×{height} pixels; at most {limits.pixels:,} are read.")
    if min(size) < limits.shortest_side:
        raise InvalidRequest(f"{path.name} has {width}×{height} pixels; each side needs {limits.shortest_side}.")


def _clean(picture: Image.Image) -> Image.Image:
    rgba = picture.convert("RGBA")
    kept = rgba if has_mask(rgba) else picture.convert("RGB")
    kept.info.clear()
    return kept


def _scaled(picture: Image.Image, side: int) -> Image.Image:
    factor = side / min(picture.size)
    if factor >= 1:
        return picture
    return picture.resize((round(picture.width * factor), round(picture.height * factor)), Image.Resampling.LANCZOS)


def has_mask(picture: Image.Image) -> bool:
    """Whether the picture is a cut-out: RGBA with something transparent and something opaque."""
    if picture.mode != "RGBA":
        return False
    low, high = picture.getchannel("A").getextrema()
    return low < 128 <= high  # type: ignore[operator]
