"""Pictures from users, made safe; pictures for the page, made small."""

from __future__ import annotations

import base64
import io
import warnings
from pathlib import Path

from PIL import Image, ImageOps, UnidentifiedImageError

from mole_diffusion.errors import InvalidFile

__all__ = ["MAX_PIXELS", "data_uri", "open_picture", "open_view", "png_bytes", "thumbnail_uri"]

MAX_PIXELS = 25_000_000
MAX_SIDE = 1024
FORMATS = ("PNG", "JPEG", "WEBP")


def open_picture(path: Path, name: str | None = None) -> Image.Image:
    """Read a user's picture: upright, RGB or RGBA, at most 1024 pixels a side, without EXIF.

    The size is read from the header before a single pixel is decoded. Raises InvalidFile for anything
    that is not a PNG, JPEG or WebP of at most 25 million pixels.
    """
    name = name or path.name
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path, formats=FORMATS) as picture:
                _check_size(picture, name)
                return _normalised(picture)
    except (Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
        raise InvalidFile(f"{name} has too many pixels: the limit is 25 million; scale it down first.") from error
    except UnidentifiedImageError as error:
        raise InvalidFile(f"{name} is not a picture this page can read: a PNG, JPEG or WebP was expected.") from error
    except (OSError, SyntaxError, ValueError) as error:
        raise InvalidFile(f"{name} is a damaged picture: it could not be read to the end; export it again.") from error


def _check_size(picture: Image.Image, name: str) -> None:
    width, height = picture.size
    if width * height > MAX_PIXELS:
        raise InvalidFile(f"{name} is {width}×{height}: the limit is 25 million pixels; scale it down first.")
    if min(width, height) < 16:
        raise InvalidFile(f"{name} is {width}×{height}: at least 16 pixels a side are needed to recognise a subject.")


def _normalised(picture: Image.Image) -> Image.Image:
    upright = ImageOps.exif_transpose(picture)
    has_alpha = "A" in upright.getbands() or "transparency" in upright.info
    clean = upright.convert("RGBA" if has_alpha else "RGB")
    clean.thumbnail((MAX_SIDE, MAX_SIDE), Image.Resampling.LANCZOS)
    clean.info.clear()
    return clean


def png_bytes(picture: Image.Image) -> bytes:
    """The picture as a PNG without any metadata."""
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG")
    return buffer.getvalue()


def data_uri(content: bytes, mime: str = "image/png") -> str:
    """Bytes as a ``data:`` address: the page shows them and no file with a public address is left behind."""
    return f"data:{mime};base64,{base64.b64encode(content).decode('ascii')}"


def open_view(path: Path) -> Image.Image:
    """A stored view of a subject, decoded; RGBA where it has a mask."""
    with Image.open(path) as picture:
        return picture.convert("RGBA" if "A" in picture.getbands() else "RGB")


def thumbnail_uri(source: Path | Image.Image, side: int = 160, background: str | None = None) -> str:
    """A small WebP of a picture as a ``data:`` address."""
    picture = Image.open(source) if isinstance(source, Path) else source
    small = picture.convert("RGBA" if "A" in picture.getbands() else "RGB")
    small.thumbnail((side, side), Image.Resampling.LANCZOS)
    if background and small.mode == "RGBA":
        flat = Image.new("RGB", small.size, background)
        flat.paste(small, mask=small.getchannel("A"))
        small = flat
    buffer = io.BytesIO()
    small.save(buffer, format="WEBP", quality=88)
    return data_uri(buffer.getvalue(), "image/webp")
