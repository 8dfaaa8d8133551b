"""What a trainer is told: commands that the loop polls between steps."""

from __future__ import annotations

from typing import Protocol


class Control(Protocol):
    """Polled once after every step. The ``take_*`` methods consume their flag."""

    def should_stop(self) -> bool:
        """True: write a checkpoint and stop."""
        ...

    def should_pause(self) -> bool:
        """True: write a checkpoint and end, to go on later; the device is free meanwhile."""
        return False

    def take_save(self) -> bool:
        """True once for each request to write a checkpoint now."""
        ...

    def take_sample(self) -> bool:
        """True once for each request to make sample pictures now."""
        ...


class Commands:
    """Commands held in memory: set them from another thread, a signal handler or a test."""

    def __init__(self) -> None:
        self.stop = False
        self.pause = False
        self.save = False
        self.sample = False

    def should_stop(self) -> bool:
        """Whether :attr:`stop` was set."""
        return self.stop

    def should_pause(self) -> bool:
        """Whether :attr:`pause` was set."""
        return self.pause

    def take_save(self) -> bool:
        """Read and clear :attr:`save`."""
        taken, self.save = self.save, False
        return taken

    def take_sample(self) -> bool:
        """Read and clear :attr:`sample`."""
        taken, self.sample = self.sample, False
        return taken
