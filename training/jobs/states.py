"""The states of a job and the only transitions between them.

queued → running → finished | failed | cancelled
   ↑________|            (retry after a crash: resumes from its checkpoint)
queued → cancelled
"""

from __future__ import annotations

from typing import Literal, get_args

State = Literal["queued", "running", "finished", "failed", "cancelled"]
STATES: tuple[State, ...] = get_args(State)
TRANSITIONS: dict[State, frozenset[State]] = {
    "queued": frozenset({"running", "cancelled"}),
    "running": frozenset({"finished", "failed", "cancelled", "queued"}),
    "finished": frozenset(),
    "failed": frozenset(),
    "cancelled": frozenset(),
}
TERMINAL: frozenset[State] = frozenset(state for state in STATES if not TRANSITIONS[state])


def sources(target: State) -> list[State]:
    """The states from which ``target`` may be reached."""
    return [state for state in STATES if target in TRANSITIONS[state]]
