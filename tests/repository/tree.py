"""The tree that these tests read: its files, and its Python as syntax."""

from __future__ import annotations

import ast
import re
import subprocess
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("mole_diffusion", "training", "app")
SKIPPED_FOLDERS = {
    ".git",
    ".venv",
    "__pycache__",
    ".pytest_cache",
    ".ruff_cache",
    "out",
    "runs",
    ".artefacts",
    ".cache",
}
MEGABYTE = 2**20


@cache
def repository_files() -> tuple[Path, ...]:
    """Every file that is or would be committed, relative to the root."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    if listed.returncode == 0 and listed.stdout:
        return tuple(Path(name) for name in listed.stdout.split("\0") if name and (ROOT / name).is_file())
    found = (path.relative_to(ROOT) for path in ROOT.rglob("*") if path.is_file())
    return tuple(path for path in found if not SKIPPED_FOLDERS & set(path.parts))


def sources(*packages: str) -> list[Path]:
    return [path for path in repository_files() if path.suffix == ".py" and path.parts[0] in packages]


@cache
def parsed(path: Path) -> ast.Module:
    return ast.parse((ROOT / path).read_text(encoding="utf-8"), filename=str(path))


def imported_roots(path: Path) -> Iterator[tuple[int, str]]:
    """(line, top-level package) of every import statement, also those inside functions; relative ones resolved."""
    for node in ast.walk(parsed(path)):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name.split(".")[0]) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            climbed_out = node.level >= len(path.parts)
            root = (node.module or "").split(".")[0] if node.level == 0 or climbed_out else path.parts[0]
            yield node.lineno, root


def dotted(node: ast.expr) -> str:
    """`a.b.c` of a chain of attributes, else what can be read of it."""
    parts: list[str] = []
    while isinstance(node, ast.Attribute):
        parts.append(node.attr)
        node = node.value
    parts.append(node.id if isinstance(node, ast.Name) else "")
    return ".".join(reversed(parts))


def calls(path: Path) -> Iterator[ast.Call]:
    return (node for node in ast.walk(parsed(path)) if isinstance(node, ast.Call))


def keyword(call: ast.Call, name: str) -> object:
    for item in call.keywords:
        if item.arg == name and isinstance(item.value, ast.Constant):
            return item.value.value
    return None


def requirements(name: str) -> dict[str, Requirement]:
    lines = (line.split("#")[0].strip() for line in (ROOT / name).read_text().splitlines())
    found = (Requirement(line) for line in lines if line and not line.startswith("-"))
    return {canonical(item.name): item for item in found}


def canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()
