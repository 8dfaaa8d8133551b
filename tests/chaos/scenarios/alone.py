"""No fault: one job of each kind, left alone. Its result is what killed jobs must arrive at, bit for bit."""

from __future__ import annotations

from tests.chaos.arena import Arena


def run(arena: Arena) -> None:
    """Run one job of each kind to its end."""
    arena.start_worker()
    for job in [arena.add(kind) for kind in arena.kinds]:
        record = arena.finish(job)
        arena.findings.check(record.state == "finished", f"a job left alone {record.state}: {record.reason}")
