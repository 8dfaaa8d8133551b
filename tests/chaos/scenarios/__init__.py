"""One file per fault; each has ``run(arena)``, and what it found is in ``arena.findings``."""

from __future__ import annotations

from collections.abc import Callable

from tests.chaos.arena import Arena

from . import alone, app, checkpoint, database, disk, kills, reboot

SCENARIOS: dict[str, Callable[[Arena], None]] = {
    "alone": alone.run,
    "kills": kills.run,
    "checkpoint": checkpoint.run,
    "disk": disk.run,
    "reboot": reboot.run,
    "database": database.run,
    "app": app.run,
    "more-kills": kills.run,
}
"""Name → what it does, in the order in which they start; ``alone`` gives the results to compare with."""
