"""A campaign: scenarios side by side, one arena each, and the sum of what they found."""

from __future__ import annotations

import os
import random
import sys
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

from sqlalchemy.exc import SQLAlchemyError

from mole_diffusion.errors import MoleError

from .arena import WORKER, Arena, Budget, Stuck
from .findings import Findings, figures, unequal_results
from .recipes import Materials
from .scenarios import SCENARIOS

RESERVE = 60.0  # seconds before the end after which no kill is done: struck jobs still have to finish
SIDE_BY_SIDE = max(3, min(6, os.cpu_count() or 1))  # a scenario often only waits


class Campaign:
    """Runs scenarios on ``materials`` below ``folder``."""

    def __init__(self, folder: Path, materials: Materials, *, seed: int = 0, command: Sequence[str] = WORKER) -> None:
        """``command``: what starts a worker; the data folder is appended."""
        self.folder, self.materials, self.seed, self.command = folder, materials, seed, command
        self._began = time.monotonic()
        self._arenas: list[Arena] = []
        self._lock = threading.Lock()

    def run(self, names: Sequence[str], kills: int, seconds: float) -> dict[str, Any]:
        """Run the scenarios of these names with ``kills`` random kills in all; the figures."""
        budget = Budget(kills, max(seconds - RESERVE, seconds / 2))
        with ThreadPoolExecutor(SIDE_BY_SIDE) as pool:
            done = list(pool.map(lambda name: self._play(name, budget, self._began + seconds), names))
        findings = dict(zip(names, done, strict=True))
        violations = [f"{name}: {sentence}" for name, one in findings.items() for sentence in one.violations]
        if "alone" in findings:
            violations += unequal_results(findings.values())
        else:
            self._say("results", "not compared, because no job is left alone without the scenario “alone”")
        if any(SCENARIOS[name] is SCENARIOS["kills"] for name in names) and budget.undone:
            violations.append(f"{kills - budget.undone} of {kills} kills fitted into the time; give more --minutes")
        return figures(findings, kills, violations, time.monotonic() - self._began)

    def abort(self) -> None:
        """End every process of this run, because somebody interrupts it."""
        for arena in self._arenas:
            arena.__exit__()

    def _play(self, name: str, budget: Budget, ends: float) -> Findings:
        began = time.monotonic()
        if began > ends:
            return Findings(violations=["not run: the time is over"])
        rng = random.Random(f"{self.seed}/{name}")
        say = partial(self._say, name)
        arena = Arena(name, self.folder / name, self.materials, rng, budget, command=self.command, say=say)
        self._arenas.append(arena)
        self._say(name, "begins")
        try:
            with arena:
                self._scene(name, arena)
        finally:
            arena.findings.seconds = time.monotonic() - began
        self._say(name, f"ends with {len(arena.findings.violations)} violations")
        return arena.findings

    def _scene(self, name: str, arena: Arena) -> None:
        for act in (
            lambda: SCENARIOS[name](arena),
            arena.close,
        ):  # what has ended is checked even where a scene is stuck
            try:
                act()
            except (Stuck, MoleError, SQLAlchemyError, OSError) as error:
                arena.findings.check(False, f"{type(error).__name__}: {error}")
                log = arena.folder / "worker.log"
                if log.is_file():
                    arena.findings.notes.append(f"the worker's last words: {log.read_text(errors='replace')[-1500:]}")

    def _say(self, name: str, text: str) -> None:
        with self._lock:
            sys.stderr.write(f"{time.monotonic() - self._began:6.0f} s  {name}: {text}\n")
