"""Processes of a run: started with a mark in their environment, so that each can be found again."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import psutil

ROOT = Path(__file__).resolve().parents[2]
MARK = "MOLE_CHAOS_MARK"
SINGLE = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "HF_HUB_OFFLINE": "1", "MOLE_DEVICE": "cpu"}
QUIET = {"GRADIO_ANALYTICS_ENABLED": "False", "MOLE_NO_WARM_UP": "1", "PYTHONUNBUFFERED": "1"}


def start(command: Sequence[str], mark: str, log: Path, more: Mapping[str, str] | None = None) -> subprocess.Popen:
    """Start ``python <command>`` in a session of its own, marked; children inherit the mark. Output goes to ``log``."""
    with log.open("ab") as output:
        return subprocess.Popen(
            [sys.executable, *command], cwd=ROOT, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT,
            env={**os.environ, **SINGLE, **QUIET, **(more or {}), MARK: mark}, start_new_session=True,
        )  # fmt: skip


def marked(mark: str) -> list[psutil.Process]:
    """The living processes with this mark, whoever their parent is now."""
    return [psutil.Process(pid) for pid in psutil.pids() if carries(pid, mark)]


def carries(pid: int, mark: str) -> bool:
    """Whether this process lives and carries the mark."""
    try:
        process = psutil.Process(pid)
        return process.status() != psutil.STATUS_ZOMBIE and process.environ().get(MARK) == mark
    except (psutil.Error, OSError):
        return False


def orphans(mark: str, grace: float) -> list[str]:
    """What still runs with this mark after ``grace`` seconds, as a sentence each; it is killed."""
    end = time.monotonic() + grace
    while (left := marked(mark)) and time.monotonic() < end:
        time.sleep(0.1)
    sentences = []
    for process in left:
        try:
            sentences.append(f"process {process.pid} is left: {' '.join(process.cmdline())}")
            process.kill()
        except psutil.Error:
            continue
    return sentences


def kill(pid: int) -> None:
    """SIGKILL to one process, and wait until it is gone."""
    try:
        process = psutil.Process(pid)
        os.kill(pid, signal.SIGKILL)
    except (psutil.Error, ProcessLookupError):
        return
    end = time.monotonic() + 10
    while time.monotonic() < end:
        try:
            if not process.is_running() or process.status() == psutil.STATUS_ZOMBIE:
                return
        except psutil.Error:
            return
        time.sleep(0.005)
