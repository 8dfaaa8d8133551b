"""Sizes, paths, licences and origins of the files of the tree."""

from __future__ import annotations

import re
from pathlib import Path

from tests.repository.tree import MEGABYTE, ROOT, repository_files


def test_files_stay_small() -> None:
    sizes = {path: (ROOT / path).stat().st_size for path in repository_files()}
    assert not [str(path) for path, size in sizes.items() if size > 50 * MEGABYTE]
    assert sum(size for path, size in sizes.items() if path.parts[0] == "assets") <= 120 * MEGABYTE


def test_no_path_or_host_of_one_machine() -> None:
    paths = (b"/wo" + b"rk/", b"/ro" + b"ot/", b"/tmp/ba" + b"sh_jobs")
    hosts = (b"py" + b"pi.org", b"python" + b"hosted", b"registry.npm" + b"js", b"deb.deb" + b"ian.org")
    pattern = re.compile(
        rb"(?<![\w.~-])(" + b"|".join(map(re.escape, paths)) + rb")|" + b"|".join(map(re.escape, hosts))
    )
    wrong = [str(path) for path in repository_files() if pattern.search((ROOT / path).read_bytes())]
    assert not wrong, wrong


def origin_named(folder: Path) -> bool:
    """Does the folder, or one above it inside assets/, hold a text that names a licence?"""
    names = ("README.md", "LICENSE", "LICENCE", "LICENSE.txt", "LICENCE.txt", "LICENCE.md", "subject.json")
    folders = [folder, *(parent for parent in folder.parents if parent.parts)]
    texts = (ROOT / one / name for one in folders for name in names)
    return any(
        text.is_file() and re.search(r"licen[cs]e", text.read_text(encoding="utf-8"), re.IGNORECASE) for text in texts
    )


def test_every_asset_names_its_licence_and_origin() -> None:
    folders = {path.parent for path in repository_files() if path.parts[0] == "assets" and path.suffix != ".md"}
    assert not [str(folder) for folder in sorted(folders) if not origin_named(folder)]
