"""Documents do not lie: links, commands, options, examples."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
import yaml

from tests.repository.tree import ROOT, repository_files, requirements


def front_matter() -> dict[str, object]:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert text.startswith("---\n")
    return yaml.safe_load(text.split("---\n")[1])


def test_space_front_matter() -> None:
    head = front_matter()
    pinned = str(requirements("requirements.txt")["gradio"].specifier)
    assert head["sdk"] == "gradio"
    assert f"=={head['sdk_version']}" == pinned
    assert head["sdk_version"] == version("gradio")
    assert head["python_version"] == "3.12"
    assert (ROOT / str(head["app_file"])).is_file()
    assert head["hf_oauth"] is True
    assert head["license"] == "apache-2.0"
    assert 0 < len(str(head["short_description"])) <= 60
    assert {"title", "emoji", "colorFrom", "colorTo", "suggested_hardware", "models"} <= set(head)


DOCUMENTS = [path for path in repository_files() if path.suffix == ".md"]


@pytest.mark.parametrize("document", DOCUMENTS, ids=str)
def test_links_between_documents_lead_somewhere(document: Path) -> None:
    text = (ROOT / document).read_text(encoding="utf-8")
    targets = [
        target
        for target in re.findall(r"\]\(([^)#\s]+)", text)
        if "://" not in target and not target.startswith("mailto:")
    ]
    missing = [target for target in targets if not ((ROOT / document).parent / target).exists()]
    assert not missing, missing


def code_blocks(document: str, language: str) -> list[str]:
    return re.findall(
        rf"^```{language}\n(.*?)^```", (ROOT / document).read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL
    )


def documented_commands() -> list[list[str]]:
    """Every `… python -m package …` line of the shell blocks, split into words; continued lines joined."""
    blocks = [block for name in ("README.md", "CONTRIBUTING.md") for block in code_blocks(name, "sh")]
    lines = (line for block in blocks for line in block.replace("\\\n", " ").splitlines() if "python -m " in line)
    return [shlex.split(line, comments=True) for line in lines]


def help_text(words: list[str]) -> str:
    """`--help` of the documented program and, if there is one, its sub-command."""
    module = words[words.index("-m") + 1]
    rest = words[words.index("-m") + 2 :]
    sub = rest[:1] if rest and not rest[0].startswith("-") else []
    done = subprocess.run([sys.executable, "-m", module, *sub, "--help"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("words", documented_commands(), ids=" ".join)
def test_documented_commands_exist(words: list[str]) -> None:
    options = {word.split("=")[0] for word in words if word.startswith("--")}
    known = set(re.findall(r"--[\w-]+", help_text(words)))
    assert options <= known, f"not an option: {sorted(options - known)}"


def test_documented_make_targets_exist() -> None:
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    shown = {
        name
        for document in ("README.md", "CONTRIBUTING.md")
        for name in re.findall(r"\bmake ([a-z-]+)`?", shell_text(document))
    }
    assert shown and shown <= targets


def shell_text(document: str) -> str:
    """What a document shows as commands: shell blocks and inline code."""
    text = (ROOT / document).read_text(encoding="utf-8")
    return "\n".join([*code_blocks(document, "sh"), *re.findall(r"`([^`\n]+)`", text)])


def test_python_examples_are_python() -> None:
    examples = code_blocks("README.md", "python")
    assert examples
    for example in examples:
        compile(example, "README.md", "exec")


def test_named_experts_ship() -> None:
    """Experts that the documents name without a path are in assets."""
    named = {words[i + 1] for words in documented_commands() for i, word in enumerate(words) if word == "--expert"}
    shipped = {path.stem for path in repository_files() if path.parts[:3] == ("assets", "demo", "experts")}
    assert named <= shipped, f"not shipped: {sorted(named - shipped)}"


def test_continuous_integration_runs_the_documented_test_command() -> None:
    script = ROOT / ".ci" / "run"
    assert script.stat().st_mode & 0o111, ".ci/run is not executable"
    subprocess.run(["bash", "-n", str(script)], check=True)
    assert script.read_text().rstrip().endswith("make test")
    shown = subprocess.run(
        ["make", "--dry-run", "--always-make", "test"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert all(tool in shown.stdout for tool in ("ruff check", "pyright", "pytest"))
