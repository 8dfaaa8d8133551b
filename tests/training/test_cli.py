"""The command line: exit codes, one sentence on bad input, JSON results, resuming."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mole_diffusion import Expert
from mole_diffusion.persist import read_composition_header
from tests.tiny import tiny_subject
from tests.training.helpers import load, lora
from training.__main__ import main
from training.jobs.executor import REPOSITORY
from training.jobs.store import JobStore
from training.jobs.worker import Worker


@pytest.mark.parametrize("command", ["subject", "gate", "router", "jobs", "run-job", "worker"])
def test_help(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main([command, "--help"])
    assert ended.value.code == 0
    assert "--" in capsys.readouterr().out


@pytest.mark.parametrize(
    "words", [[], ["haircut"], ["gate"], ["subject", "--adapter", "dora"], ["gate", "--objective", "clip"]]
)
def test_wrong_words_exit_with_2(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(words)
    assert ended.value.code == 2 and "usage" in capsys.readouterr().err


def test_subject_then_gate(base_folders: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = ["--base", str(base_folders["sd-v"]), "--steps", "2", "--batch", "2", "--json"]
    files = []
    for name, colour in (("robot", "red"), ("alien", "green")):
        images = tiny_subject(tmp_path, name, colour) / "train"
        files.append(str(tmp_path / f"{name}.safetensors"))
        words = ["subject", *base, "--images", str(images), "--token", "zwx", "--class", name, "--rank", "2"]
        assert main([*words, "--out", files[-1]]) == 0
        assert json.loads(capsys.readouterr().out)["trigger"] == f"zwx {name}"
        assert Expert.load(files[-1]).name == name
    words = ["gate", *base, "--expert", files[0], "--expert", files[1], "--scope", "token", "--alpha", "0.1"]
    views = ["--views", str(tmp_path / "robot" / "train"), "--views", str(tmp_path / "alien" / "train")]
    out = tmp_path / "both.safetensors"
    assert main([*words, *views, "--pool", "4", "--validation", "2", "--out", str(out)]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["status"] == "finished" and result["experts"] == ["robot", "alien"]
    assert read_composition_header(out)["recipe"]["alpha"] == 0.1


def test_demo_experts_by_name(demo_assets: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "both.safetensors"
    words = ["gate", "--expert", "robot", "--expert", "bunny", "--steps", "1", "--batch", "1", "--pool", "2"]
    assert main([*words, "--validation", "0", "--out", str(out)]) == 0
    assert f"Wrote {out}" in capsys.readouterr().out
    assert not list((tmp_path / "both.training").glob("views-*"))  # the demo's own pictures were used


def test_bad_input_is_one_sentence(
    base_folders: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, pipe = load(base_folders["sd-v"])
    file = str(lora(tmp_path, pipe, "robot", seed=1))
    base = ["--base", str(base_folders["sd-v"])]
    out = ["--out", str(tmp_path / "o.safetensors")]
    subject = ["subject", "--images", str(tmp_path / "none"), "--token", "zwx", "--class", "robot"]
    for words, sentence in (
        ([*subject, *base, *out], "not a folder"),
        ([*subject, *base, "--out", "o.bin"], ".safetensors file"),
        ([*subject, *base, *out, "--rank", "0"], "rank is between"),
        (["gate", *base, *out, "--expert", file], "at least two"),
        (["gate", *base, *out, "--expert", file, "--expert", file], "own triggers"),
        (["gate", *base, *out, "--expert", "imagined"], "neither a file nor a demo expert"),
        (["run-job", "../../etc", "--data-dir", str(tmp_path)], "hexadecimal"),
    ):
        assert main(words) == 2, words
        error = capsys.readouterr().err.strip()
        assert sentence in error and "Traceback" not in error, error


def test_worker_serves_once_per_folder_and_ends_on_sigterm(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = [sys.executable, "-m", "training", "worker", "--data-dir", str(tmp_path)]
    process = subprocess.Popen(command, cwd=REPOSITORY, stderr=subprocess.PIPE, text=True)
    try:
        assert process.stderr is not None and "Serving" in process.stderr.readline()
        assert main(["worker", "--data-dir", str(tmp_path)]) == 2
        assert "Another worker" in capsys.readouterr().err
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 0
    finally:
        process.kill()
    worker = Worker(JobStore.of(tmp_path), tmp_path)
    worker.acquire()
    worker.request_stop()
    worker.serve()


@pytest.mark.timeout(900)
def test_interrupt_keeps_a_checkpoint_and_resume_goes_on(
    base_folders: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    images = tiny_subject(tmp_path, "robot", "red") / "train"
    words = ["subject", "--base", str(base_folders["sd-v"]), "--images", str(images), "--token", "zwx", "--class",
             "robot", "--rank", "2", "--batch", "1", "--out", str(tmp_path / "r.safetensors")]  # fmt: skip
    command = [sys.executable, "-m", "training", *words, "--steps", "2000", "--save-every", "1"]
    process = subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    checkpoints = tmp_path / "r.training" / "checkpoints"
    end = time.monotonic() + 400
    while not list(checkpoints.glob("step-*")):
        assert process.poll() is None and time.monotonic() < end
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=200)
    assert process.returncode == 130 and "--resume goes on" in output
    assert main([*words, "--steps", "2000", "--lr", "0.5", "--resume"]) == 2  # and not by starting anew
    assert "other settings" in capsys.readouterr().err
