"""What a scenario found: kills, jobs, violations, and the figures that are printed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True)
class Kill:
    """One SIGKILL: who died, and what the job was doing as far as anybody could see."""

    target: str
    """child, worker, both or app."""
    phase: str
    """queued, claim, start, step, checkpoint, sample, finish or ended."""
    job: str
    step: int


@dataclass(frozen=True)
class JobReport:
    """How one job went, read from its record after its end."""

    job: str
    kind: str
    state: str
    attempts: int
    """How often a process was started for it."""
    resumed: int
    """How often it went on from a checkpoint."""
    lost: tuple[int, ...]
    """Steps done again after each interruption."""
    digest: str | None
    """SHA-256 of what its result file holds; None without one."""
    comparable: bool = True
    """Whether it is the recipe of its kind, so that its result must equal the reference."""


@dataclass
class Findings:
    """What one scenario found. A violation is a sentence; a note is a fact worth reading."""

    kills: list[Kill] = field(default_factory=list)
    jobs: list[JobReport] = field(default_factory=list)
    violations: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    seconds: float = 0.0

    def check(self, holds: object, sentence: str) -> None:
        """Write ``sentence`` down as a violation unless ``holds``."""
        if not holds:
            self.violations.append(sentence)


def unequal_results(findings: Iterable[Findings]) -> list[str]:
    """Killed jobs whose result differs from that of the same job left alone: one sentence each."""
    reports = [job for one in findings for job in one.jobs if job.comparable and job.state == "finished"]
    left_alone = {job.kind: job.digest for job in reports if job.attempts == 1}
    wrong = []
    for job in reports:
        if job.kind not in left_alone:
            wrong.append(f"{job.kind} job {job.job}: no job of its kind was left alone, so nothing to compare it with.")
        elif job.digest != left_alone[job.kind]:
            wrong.append(
                f"{job.kind} job {job.job}: after {job.attempts} starts its result differs from that of the same job "
                "left alone."
            )
    return wrong


def figures(findings: dict[str, Findings], asked: int, violations: list[str], seconds: float) -> dict[str, Any]:
    """Everything as JSON values; ``mean_lost`` and ``max_lost`` are in steps, over all interruptions."""
    kills = [kill for one in findings.values() for kill in one.kills]
    jobs = [job for one in findings.values() for job in one.jobs]
    lost = [steps for job in jobs for steps in job.lost]
    compared = [job for job in jobs if job.comparable and job.state == "finished" and job.attempts > 1]
    return {
        "kills": {
            "asked": asked,
            "done": len(kills),
            "by_target": dict(Counter(kill.target for kill in kills)),
            "by_phase": dict(Counter(f"{kill.target}/{kill.phase}" for kill in kills)),
        },
        "jobs": {
            "all": len(jobs),
            "by_kind": dict(Counter(job.kind for job in jobs)),
            "by_state": dict(Counter(job.state for job in jobs)),
            "starts": sum(job.attempts for job in jobs),
            "resumed": sum(job.resumed for job in jobs),
            "compared_after_kills": len(compared),
        },
        "interruptions": len(lost),
        "max_lost": max(lost, default=0),
        "mean_lost": round(sum(lost) / len(lost), 2) if lost else 0.0,
        "violations": violations,
        "scenarios": {
            name: {"seconds": round(one.seconds, 1), "notes": one.notes, "jobs": [asdict(job) for job in one.jobs]}
            for name, one in findings.items()
        },
        "seconds": round(seconds, 1),
    }


def summary(result: dict[str, Any]) -> str:
    """The figures for people."""
    kills, jobs = result["kills"], result["jobs"]
    counts = ", ".join(f"{number} {name}" for name, number in sorted(kills["by_phase"].items()))
    states = ", ".join(f"{number} {name}" for name, number in sorted(jobs["by_state"].items()))
    kinds = ", ".join(f"{number} {name}" for name, number in sorted(jobs["by_kind"].items()))
    lines = [
        f"{kills['done']} kills ({kills['asked']} asked for): {counts or 'none'}",
        f"{jobs['all']} jobs ({kinds}): {states}; {jobs['starts']} starts, {jobs['resumed']} resumed, "
        f"{jobs['compared_after_kills']} finished after kills and compared with the job left alone",
        f"steps lost at {result['interruptions']} interruptions: {result['mean_lost']} on average, "
        f"{result['max_lost']} at most",
    ]
    for name, one in result["scenarios"].items():
        lines += [f"{name}: {note}" for note in one["notes"]]
    lines += [f"VIOLATION {sentence}" for sentence in result["violations"]]
    lines.append(f"{len(result['violations'])} violations in {result['seconds']:.0f} seconds")
    return "\n".join(lines)
