"""The latest checkpoint is damaged while nobody runs: the job goes on from the one before, and says so."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from tests.chaos import invariants
from tests.chaos.arena import Arena


def flip(checkpoint: Path) -> None:
    """One byte of the tensors is another."""
    file = checkpoint / "state.safetensors"
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 0xFF
    file.write_bytes(data)


def truncate(checkpoint: Path) -> None:
    """The second half of the tensors is gone."""
    file = checkpoint / "state.safetensors"
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def without_json(checkpoint: Path) -> None:
    """The record of the checkpoint is gone."""
    (checkpoint / "state.json").unlink()


DAMAGES: dict[str, Callable[[Path], None]] = {
    "flipped byte": flip,
    "truncated tensors": truncate,
    "missing json": without_json,
}


def run(arena: Arena) -> None:
    """One job of the first kind: killed with its worker after two checkpoints, three times, damaged each time."""
    arena.start_worker()
    job = arena.add(arena.kinds[0], allowed=2)
    for number, (name, damage) in enumerate(DAMAGES.items(), 1):
        arena.wait_steps(job, 2 * arena.jobs[job].save_every + 2, start=number)
        arena.kill_worker()
        arena.kill_child(job)
        arena.struck("both", "step", job)
        whole, latest = sorted((arena.job_folder(job) / "checkpoints").glob("step-*"))[-2:]
        damage(latest)
        arena.start_worker()
        arena.wait_steps(job, 1, start=number + 1)
        resumed = invariants.attempts(arena.events(job))[-1].resumed
        expected = int(whole.name.removeprefix("step-"))
        arena.findings.check(resumed == expected, f"{name}: resumed after step {resumed}, not {expected}")
        told = any(latest.name in str(event.data.get("text")) for event in arena.events(job, "log"))
        arena.findings.check(told, f"{name}: the log does not name the damaged checkpoint {latest.name}")
        arena.say(f"{name}: resumed after step {resumed}")
    record = arena.finish(job)
    arena.findings.check(record.state == "finished", f"the job {record.state}: {record.reason}")
