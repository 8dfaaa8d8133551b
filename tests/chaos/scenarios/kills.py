"""SIGKILL of the child, the worker or both, at moments chosen by time and by what was seen."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

from tests.chaos.arena import ENDED, Arena

TARGETS = {"child": 50, "worker": 40, "both": 10}
MOMENTS = {"start": 35, "step": 25, "checkpoint": 20, "sample": 10, "finish": 10}
START_SECONDS = 12.0  # from a job's start to its first step, until this run has measured it
FATAL_CHANCE = 0.15  # of a kill that the job need not survive
RESTART_SECONDS = 1.5
LOOK, STARE = 0.05, 0.004  # seconds between two looks; a checkpoint is written in few of them


@dataclass
class Watch:
    """What a job has said, read as it comes."""

    arena: Arena
    job: str
    last: int = 0
    starts: int = 0
    step: int | None = None
    """Last step of the present process; None before its first."""
    sampled: int = 0
    saved: bool = False
    """Whether the present process has written a checkpoint."""
    began: float = 0.0
    slow: float = START_SECONDS
    """Seconds from the last start to its first step."""

    def look(self) -> str:
        """Read what is new and say what the job is doing: a phase of :class:`tests.chaos.findings.Kill`."""
        for event in self.arena.events(self.job, after=self.last):
            self.last = event.number
            if event.type == "state" and event.data.get("state") == "running":
                self.starts, self.step, self.saved, self.began = self.starts + 1, None, False, event.time
            elif event.type == "progress":
                self.slow = event.time - self.began if self.step is None else self.slow
                self.step = event.step
            elif event.type == "saved":
                self.saved = True
            elif event.type == "sample":
                self.sampled = event.step or 0
        return self._phase()

    def _phase(self) -> str:
        record, recipe = self.arena.store.get(self.job), self.arena.jobs[self.job]
        if record.state in ENDED:
            return "ended"
        if record.state != "running":
            return "queued"
        if self.step is None:
            return "claim" if record.pid is None else "start"
        if any(self.arena.job_folder(self.job).glob("checkpoints/.*")):
            return "checkpoint"
        due = recipe.sample_every and self.step % recipe.sample_every == 0
        if due and self.sampled < self.step:
            return "sample"
        return "finish" if self.step >= recipe.steps else "step"


def run(arena: Arena) -> None:
    """Jobs of all kinds in turn, struck until the budget of kills is spent; each then goes on to its end."""
    arena.start_worker()
    turn, slow = arena.rng.randrange(len(arena.kinds)), START_SECONDS
    while arena.budget.left:
        slow = _one_job(arena, arena.kinds[turn % len(arena.kinds)], slow)
        turn += 1


def _one_job(arena: Arena, kind: str, slow: float) -> float:
    """Strike one job to its end. ``slow`` and the answer: seconds that a start takes here."""
    job = arena.add(kind)
    watch = Watch(arena, job, slow=slow)
    while arena.budget.take():
        target = arena.rng.choices(list(TARGETS), list(TARGETS.values()))[0]
        phase = _worker_moment(arena, watch) if target == "worker" else _child_moment(arena, watch)
        if phase is None:
            arena.budget.give_back()
            break
        if not _strike(arena, watch, target, phase):
            arena.budget.give_back()
    record = arena.finish(job)
    if record.state == "failed" and arena.retry(job):
        record = arena.finish(job)
        arena.findings.check(record.state == "finished", f"a retried {kind} job {record.state}: {record.reason}")
    return watch.slow


def _strike(arena: Arena, watch: Watch, target: str, phase: str) -> bool:
    """Kill; whether there was somebody to kill."""
    if target in ("worker", "both"):
        arena.kill_worker()
    if target != "worker" and not arena.kill_child(watch.job):
        if target == "child":
            return False
        target = "worker"
    arena.struck(target, phase, watch.job)
    recipe = arena.jobs[watch.job]
    arena.say(f"{target} killed, {phase}, step {watch.step or 0} of {recipe.steps}, {recipe.kind}")
    if target in ("worker", "both"):
        time.sleep(arena.rng.uniform(0, RESTART_SECONDS))
        arena.start_worker()
    return True


def _worker_moment(arena: Arena, watch: Watch) -> str | None:
    """Some time from now, or the moment at which a job is taken from the queue; None if the job ended before."""
    if arena.rng.random() < 0.4:
        return _await(watch, lambda phase: phase == "claim" or watch.step is not None, STARE)
    ends = time.monotonic() + arena.rng.uniform(0, watch.slow / 2)
    return _await(watch, lambda phase: time.monotonic() >= ends)


def _child_moment(arena: Arena, watch: Watch) -> str | None:
    """A random moment of the job's process; None if the job ended before.

    The second process in turn that dies without a checkpoint fails the job, by right: that is left to a small chance.
    """
    if _await(watch, lambda phase: arena.pid(watch.job) is not None and phase != "claim") is None:
        return None
    moment = arena.rng.choices(list(MOMENTS), list(MOMENTS.values()))[0]
    if watch.starts > 1 and not watch.saved:
        if arena.rng.random() < FATAL_CHANCE:
            moment = "start"
        elif _await(watch, lambda phase: watch.saved) is None:
            return None
    return _await(watch, _condition(arena, watch, moment), STARE if moment == "checkpoint" else LOOK)


def _condition(arena: Arena, watch: Watch, moment: str) -> Callable[[str], bool]:
    recipe, jitter = arena.jobs[watch.job], arena.rng.uniform(0, 0.3)
    if moment == "start":
        ends = time.monotonic() + arena.rng.uniform(0, watch.slow)
        return lambda phase: time.monotonic() >= ends or watch.step is not None
    if moment == "checkpoint":
        return lambda phase: phase == "checkpoint"
    if moment in ("sample", "finish"):
        return _after(jitter, lambda phase: phase == moment)
    goal = (watch.step or 0) + arena.rng.randint(1, max(recipe.steps // 4, 1))
    return _after(jitter, lambda phase: watch.step is not None and watch.step >= goal)


def _after(seconds: float, condition: Callable[[str], bool]) -> Callable[[str], bool]:
    """``condition``, and then some time."""
    since: list[float] = []

    def then(phase: str) -> bool:
        if not since and condition(phase):
            since.append(time.monotonic())
        return bool(since) and time.monotonic() - since[0] >= seconds

    return then


def _await(watch: Watch, condition: Callable[[str], bool], every: float = LOOK) -> str | None:
    """The phase in which ``condition`` became true; None if the job ended or the time for kills is over.

    ``every``: seconds between two looks.
    """
    while time.monotonic() < watch.arena.budget.ends:
        phase = watch.look()
        if phase == "ended":
            return None
        if condition(phase):
            return phase
        time.sleep(every)
    return None
