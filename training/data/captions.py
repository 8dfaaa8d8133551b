"""Captions of photos: from the files beside them, with the trigger put in, and as a file to look at and edit."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mole_diffusion.errors import InvalidRequest
from training.base.scenes import article

METADATA = "metadata.jsonl"
LONGEST = 500
"""Characters of a caption; what a text encoder reads is shorter still."""
FILE_SIZE = 2**20
SIDES = re.compile(r"\b(left|right)\b", re.IGNORECASE)


def read_captions(folder: Path, names: Sequence[str], metadata: str = METADATA) -> dict[str, str]:
    """Captions of the pictures ``names`` in ``folder``, by name; a picture without one is left out.

    Read are ``<picture>.txt`` beside a picture (kohya's convention) and, for those without, lines
    {"file_name": …, "text": …} of ``metadata.jsonl`` (the Hub's image folders).

    Raises:
        InvalidRequest: a file is not UTF-8, a line is no such object, or a caption is longer than ``LONGEST``.
    """
    found = _listed(folder / metadata)
    for name in names:
        path = (folder / name).with_suffix(".txt")
        if path.is_file():
            found[name] = _text(path)
    return {name: checked(found[name], name) for name in names if found.get(name, "").strip()}


def checked(caption: str, name: str) -> str:
    """The caption of picture ``name`` on one line. Raises InvalidRequest where it is too long."""
    line = " ".join(caption.split())
    if len(line) > LONGEST:
        raise InvalidRequest(f"The caption of {name} has {len(line)} characters; shorten it to at most {LONGEST}.")
    return line


def with_trigger(caption: str, token: str, class_name: str) -> str:
    """The caption with the token in it: as it is, before the class's word, or "<token> <class>" in front of it all."""
    token, class_name = token.strip(), class_name.strip()
    if re.search(_word(token), caption, re.IGNORECASE):
        return caption
    phrase = f"{token} {class_name}".strip()
    if class_name:
        for pattern, words in ((rf"\ban? +{_word(class_name)}", article(phrase)), (_word(class_name), phrase)):
            if re.search(pattern, caption, re.IGNORECASE):
                return re.sub(pattern, lambda _, words=words: words, caption, count=1, flags=re.IGNORECASE)
    return f"{article(phrase)}, {caption}" if caption else article(phrase)


def names_a_side(caption: str) -> bool:
    """Whether the caption speaks of left or right, so that a mirrored picture would contradict it."""
    return SIDES.search(caption) is not None


def write_captions(path: Path, captions: Mapping[str, str]) -> None:
    """Write {"file_name": …, "text": …} lines, atomically; as ``metadata.jsonl`` beside the pictures they are read."""
    lines = [json.dumps({"file_name": name, "text": text}, ensure_ascii=False) for name, text in captions.items()]
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    temporary.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    os.replace(temporary, path)


def _word(text: str) -> str:
    return rf"(?<!\w){re.escape(text)}(?!\w)"


def _text(path: Path) -> str:
    if path.stat().st_size > FILE_SIZE:
        raise InvalidRequest(f"{path.name} is larger than {FILE_SIZE // 2**20} MB; captions are short texts.")
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise InvalidRequest(f"{path.name} is not UTF-8 text: save it again as UTF-8.") from error


def _listed(path: Path) -> dict[str, str]:
    if not path.is_file():
        return {}
    return dict(_entry(path, number, line) for number, line in enumerate(_text(path).splitlines(), 1) if line.strip())


def _entry(path: Path, number: int, line: str) -> tuple[str, str]:
    try:
        entry: Any = json.loads(line)
    except (ValueError, RecursionError):
        entry = None
    if not isinstance(entry, dict) or not all(isinstance(entry.get(key), str) for key in ("file_name", "text")):
        raise InvalidRequest(
            f'Line {number} of {path.name} is not {{"file_name": "…", "text": "…"}}: correct it or remove the file.'
        )
    return entry["file_name"], entry["text"]
