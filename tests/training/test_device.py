"""The device that the user asked for reaches the training process."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from mole_diffusion.errors import InvalidRequest
from training.build import device_asked_for, load_base
from training.jobs.executor import LocalExecutor


def test_jobs_train_where_the_page_was_told_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MOLE_DEVICE", raising=False)
    say = [sys.executable, "-c", "import os; print(os.environ.get('MOLE_DEVICE'))"]
    for number, (device, heard) in enumerate({"cpu": "cpu", None: "None"}.items()):
        job = f"{number:032x}"
        process = LocalExecutor(lambda *_: say, device=device).start(job, tmp_path)
        assert process.child is not None and process.child.wait() == 0
        assert (tmp_path / "jobs" / job / "log.txt").read_text().strip() == heard


def test_a_device_that_is_not_there_is_named(monkeypatch: pytest.MonkeyPatch, base_folders: dict[str, Path]) -> None:
    for told, meant in {"": None, "auto": None, "cpu": "cpu"}.items():
        monkeypatch.setenv("MOLE_DEVICE", told)
        assert device_asked_for() == meant
    monkeypatch.setenv("MOLE_DEVICE", "mps")
    with pytest.raises(InvalidRequest, match="'mps' was asked for"):
        load_base(str(base_folders["sd-v"]), None)
