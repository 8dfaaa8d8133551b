"""Imports point in one direction, the core is light to import, no module works at import."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from tests.repository.tree import ROOT, imported_roots, sources


@pytest.mark.parametrize(
    ("package", "forbidden"),
    [
        ("mole_diffusion", {"training", "app", "gradio", "gradio_client", "spaces", "tests"}),
        ("training", {"app", "gradio", "gradio_client", "spaces", "tests"}),
        ("app", {"tests"}),
    ],
)
def test_imports_point_in_one_direction(package: str, forbidden: set[str]) -> None:
    wrong = [
        f"{path}:{line} imports {root}"
        for path in sources(package)
        for line, root in imported_roots(path)
        if root in forbidden
    ]
    assert not wrong, "\n".join(wrong)


WATCH = """
import importlib, json, pkgutil, sys
touched = []
def hook(event, arguments):
    if event == "open" and str(arguments[0]).endswith((".safetensors", ".db", ".png", ".jpg", ".pth", ".bin")):
        touched.append(str(arguments[0]))
    elif event in ("socket.connect", "subprocess.Popen", "os.mkdir") and not any(
        name in str(arguments[0]) for name in ("__pycache__", "torchinductor")  # torch makes the second for itself
    ):
        touched.append(event)
sys.addaudithook(hook)
{imports}
print(json.dumps({{"modules": sorted({{name.split(".")[0] for name in sys.modules}}), "touched": touched}}))
"""
EVERY_MODULE = """
package = importlib.import_module({package!r})
for found in pkgutil.walk_packages(package.__path__, package.__name__ + "."):
    if not found.name.endswith("__main__"):
        importlib.import_module(found.name)
"""


def import_report(imports: str) -> dict[str, list[str]]:
    """Run import statements in a fresh interpreter: which packages came in, which files and sockets were touched."""
    done = subprocess.run(
        [sys.executable, "-c", WATCH.format(imports=imports)], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_importing_the_core_is_light() -> None:
    report = import_report("import mole_diffusion")
    assert not {"torch", "diffusers", "transformers", "gradio"} & set(report["modules"])
    assert report["touched"] == []


@pytest.mark.parametrize(
    ("package", "absent"), [("mole_diffusion", {"gradio", "training", "app"}), ("training", {"gradio", "app"})]
)
def test_no_module_works_at_import(package: str, absent: set[str]) -> None:
    report = import_report(EVERY_MODULE.format(package=package))
    assert not absent & set(report["modules"])
    ours = [
        item for item in report["touched"] if item in ("socket.connect", "os.mkdir") or str(ROOT / "assets") in item
    ]
    assert ours == []
