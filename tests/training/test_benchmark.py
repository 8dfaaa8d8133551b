"""The benchmark of training steps runs: every contender trains, times are paired, numbers are told in JSON."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.benchmarks.training import MAKERS, main


@pytest.mark.long
def test_benchmark_of_training_steps(
    base_folders: dict[str, Path], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MOLE_DEVICE", "cpu")
    words = ["--base", str(base_folders["sd-v"]), "--rounds", "2", "--batch", "1", "--rank", "2", "--json"]
    assert main(words) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["rows"].keys() == MAKERS.keys() and (told["rounds"], told["device"]) == (2, "cpu")
    assert told["rows"]["lora"]["ratio"] == 1.0
    for row in told["rows"].values():
        assert row["seconds"] > 0 and row["loss"] > 0
        assert row["quartiles_s"][0] <= row["seconds"] <= row["quartiles_s"][1]
