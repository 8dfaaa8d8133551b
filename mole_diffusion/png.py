"""Pictures that know how they were made: PNG files with the parameters inside, as text chunk ``mole``."""

from __future__ import annotations

import json
import os
import struct
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from mole_diffusion.errors import InvalidFile

KEY = "mole"
MAX_PIXELS = 25_000_000
MAX_BYTES = 64 * 2**20
_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_HEADER_BYTES = 24


def save_png(image: Image.Image, path: Path | str, parameters: Mapping[str, Any]) -> Path:
    """Write a picture with its parameters; a half file never appears under the real name."""
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    info = PngInfo()
    info.add_text(KEY, json.dumps(parameters, ensure_ascii=True, sort_keys=True))
    handle, unfinished = tempfile.mkstemp(dir=target.parent, prefix=".", suffix=".png")
    try:
        with os.fdopen(handle, "wb") as file:
            image.save(file, format="PNG", pnginfo=info)
        os.replace(unfinished, target)
    except BaseException:
        Path(unfinished).unlink(missing_ok=True)
        raise
    return target


def read_parameters(path: Path | str) -> dict[str, Any]:
    """The parameters inside a picture that ``save_png`` wrote, wherever the picture has been since.

    Raises:
        InvalidFile: not a PNG, larger than a picture of ours can be, damaged, or without parameters.
    """
    source = Path(path)
    _check_header(source)
    try:
        with Image.open(source, formats=["PNG"]) as picture:
            text = picture.info.get(KEY)
    except (OSError, SyntaxError, ValueError) as error:
        raise InvalidFile(f"{source.name} is a damaged PNG ({error}): take the original file.") from error
    return _parse(source.name, text)


def _check_header(path: Path) -> None:
    """Size in bytes and in pixels, from the file's first bytes: nothing is decoded before both are small enough."""
    try:
        with path.open("rb") as file:
            head = file.read(_HEADER_BYTES)
        size = path.stat().st_size
    except OSError as error:
        raise InvalidFile(f"{path.name} cannot be read: {error.strerror}.") from error
    if len(head) < _HEADER_BYTES or not head.startswith(_SIGNATURE) or head[12:16] != b"IHDR":
        raise InvalidFile(f"Expected a PNG picture, {path.name} is something else.")
    width, height = struct.unpack(">II", head[16:24])
    if size > MAX_BYTES or width * height > MAX_PIXELS:
        raise InvalidFile(
            f"{path.name} is too large ({width}×{height} pixels, {size / 2**20:.0f} MiB): at most "
            f"{MAX_PIXELS // 10**6} million pixels and {MAX_BYTES // 2**20} MiB are read."
        )


def _parse(name: str, text: object) -> dict[str, Any]:
    if not isinstance(text, str):
        raise InvalidFile(f"{name} carries no parameters: it was not made here, or they were stripped on the way.")
    try:
        parameters = json.loads(text)
    except ValueError as error:
        raise InvalidFile(f"The parameters in {name} are damaged: {error}.") from error
    if not isinstance(parameters, dict):
        raise InvalidFile(f"The parameters in {name} are damaged: expected a table of settings.")
    return parameters
