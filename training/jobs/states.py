"""The states of a job and the only transitions between them.

queued → running → finished | failed | cancelled     those three have ended: nothing happens unless somebody asks
   ↑________|↓                    (back to the queue after a crash or a shutdown: goes on from its checkpoint)
   ↑______paused → cancelled      (a checkpoint is written and the device is free)
   ↑______failed, cancelled       (retry, resume: goes on from the last checkpoint)
queued → cancelled
"""

from __future__ import annotations

from typing import Literal, get_args

State = Literal["queued", "running", "paused", "finished", "failed", "cancelled"]
STATES: tuple[State, ...] = get_args(State)
TRANSITIONS: dict[State, frozenset[State]] = {
    "queued": frozenset({"running", "cancelled"}),
    "running": frozenset({"finished", "failed", "cancelled", "paused", "queued"}),
    "paused": frozenset({"queued", "cancelled"}),
    "finished": frozenset(),
    "failed": frozenset({"queued"}),
    "cancelled": frozenset({"queued"}),
}
TERMINAL: frozenset[State] = frozenset({"finished", "failed", "cancelled"})
WAITING: frozenset[State] = frozenset({"queued", "running", "paused"})
"""What counts against a visitor's limit: everything that still wants a device."""


def sources(target: State) -> list[State]:
    """The states from which ``target`` may be reached."""
    return [state for state in STATES if target in TRANSITIONS[state]]
