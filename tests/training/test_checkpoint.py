"""Checkpoints: whole or not at all, two kept, damaged ones set aside, full disks, what killed processes leave."""

from __future__ import annotations

import errno
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import training.checkpoint as checkpoint
from training.checkpoint import checkpoints, clear, load_latest, read_checkpoint, save_checkpoint
from training.errors import TrainingFailed

REPOSITORY = Path(__file__).parents[2]
STATE = {"a": torch.arange(6.0), "b": [1, None]}


@pytest.mark.parametrize("name", ["state.json", "state.safetensors"])
def test_missing_or_empty_part_is_skipped(tmp_path: Path, name: str) -> None:
    save_checkpoint(tmp_path, 1, {"a": torch.ones(2)})
    save_checkpoint(tmp_path, 2, {"a": torch.zeros(2)})
    (tmp_path / "step-00000002" / name).write_bytes(b"")
    step, state, skipped = load_latest(tmp_path)
    assert step == 1 and torch.equal(state["a"], torch.ones(2)) and len(skipped) == 1
    assert [path.name for path in checkpoints(tmp_path)] == ["step-00000001"]
    assert (tmp_path / "damaged-step-00000002").is_dir()


def test_checkpoint_keeps_kinds_and_two_newest(tmp_path: Path) -> None:
    state = {"a": [1, 2.5, None, "x", True], "b": (torch.arange(3), {0: torch.tensor(1.0, dtype=torch.bfloat16)})}
    for step in (1, 2, 3):
        save_checkpoint(tmp_path, step, state)
    assert [path.name for path in checkpoints(tmp_path)] == ["step-00000002", "step-00000003"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000002", "step-00000003"]
    step, loaded, _ = load_latest(tmp_path)
    assert step == 3 and loaded["a"] == state["a"] and isinstance(loaded["b"], tuple)
    assert torch.equal(loaded["b"][0], torch.arange(3)) and loaded["b"][1][0].dtype == torch.bfloat16


def test_checkpoint_refuses_what_it_cannot_hold(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="object"):
        save_checkpoint(tmp_path, 1, {"a": object()})
    assert load_latest(tmp_path)[0] == 0


def test_disk_that_fills_up_keeps_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_checkpoint(tmp_path, 1, STATE)
    original = checkpoint._write

    def write(path: Path, data: bytes) -> None:
        if path.name == checkpoint.VALUES:
            raise OSError(errno.ENOSPC, "No space left on device")
        original(path, data)

    monkeypatch.setattr(checkpoint, "_write", write)
    with pytest.raises(TrainingFailed, match=r"disk is full: the checkpoint of step 2 needs 0\.\d MB"):
        save_checkpoint(tmp_path, 2, STATE)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]
    assert load_latest(tmp_path)[0] == 1


def test_really_full_disk_is_a_sentence(tmp_path: Path) -> None:
    """A process that may write 200 kB a file stands for a disk of that size: the system refuses the rest."""
    program = f"""
import errno, resource, signal, torch
from pathlib import Path
from training.checkpoint import FULL, save_checkpoint, load_latest
import training.checkpoint as checkpoint
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))
checkpoint.FULL = (*FULL, errno.EFBIG)
folder = Path({str(tmp_path)!r})
save_checkpoint(folder, 1, {{"a": torch.ones(9)}})
try:
    save_checkpoint(folder, 2, {{"a": torch.ones(100_000)}})
except Exception as error:
    print(type(error).__name__, error)
print(load_latest(folder)[0], sorted(path.name for path in folder.iterdir()))
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=REPOSITORY, capture_output=True, text=True, timeout=120)
    first, last = done.stdout.strip().splitlines()
    assert first.startswith("TrainingFailed The disk is full: the checkpoint of step 2 needs 0.4 MB"), done.stderr
    assert last == "1 ['step-00000001']"


def test_folder_that_cannot_be_written_is_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(TrainingFailed, match=r"step 3 cannot be written \(Not a directory\)"):
        save_checkpoint(tmp_path / "file" / "checkpoints", 3, STATE)


def test_what_a_killed_process_left_goes_at_the_next_save(tmp_path: Path) -> None:
    dead, live = (tmp_path / f".writing-{socket.gethostname()}-{pid}" for pid in (99_999_999, os.getppid()))
    for left in (dead, live):
        left.mkdir()
        (left / "state.safetensors").write_bytes(b"half")
    save_checkpoint(tmp_path, 1, STATE)
    assert sorted(path.name for path in tmp_path.iterdir()) == [live.name, "step-00000001"]


def test_only_names_of_checkpoints_are_read(tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path, 4, STATE)
    for name in ("step-9", "step-00000005.old", "step-abcdefgh"):
        (tmp_path / name).mkdir()
    assert checkpoints(tmp_path) == [path]
    path.rename(tmp_path / "step-00000007")
    with pytest.raises(ValueError, match="another step's"):
        read_checkpoint(tmp_path / "step-00000007")


def test_sizes_are_checked_before_anything_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = save_checkpoint(tmp_path, 1, STATE)
    record = json.loads((path / "state.json").read_text())
    assert record["bytes"] == (path / "state.safetensors").stat().st_size
    with (path / "state.safetensors").open("ab") as file:
        file.truncate(10**12)  # a sparse file of a terabyte: hashing it would take an hour
    with pytest.raises(ValueError, match="differ"):
        read_checkpoint(path)
    monkeypatch.setattr(checkpoint, "MAX_VALUES", 10)
    with pytest.raises(ValueError, match="larger than any"):
        read_checkpoint(path)


def test_clear_leaves_nothing(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, 1, STATE)
    save_checkpoint(tmp_path, 2, STATE)
    (tmp_path / "step-00000002" / "state.json").write_text("{}")
    assert load_latest(tmp_path)[0] == 1
    clear(tmp_path)
    assert not list(tmp_path.iterdir())
