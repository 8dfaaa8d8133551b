"""What a trainer says: small frozen events, sent to a sink. It never prints and never knows who listens."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol


@dataclass(frozen=True)
class Progress:
    """One optimisation step is done. ``step`` counts finished steps, 1…``total``."""

    step: int
    total: int
    loss: float
    metrics: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class LogLine:
    """A line for the job's log."""

    text: str


@dataclass(frozen=True)
class Sample:
    """A picture made during training."""

    path: str
    step: int
    scores: Mapping[str, float] = field(default_factory=dict)
    """Alignment: cosine of the picture with the prompt ("prompt") and with each subject's words, by its name."""
    prompt: str = ""
    identity: Mapping[str, float] = field(default_factory=dict)
    """How much each subject's place in the picture looks like its pictures, by its name."""
    scorers: tuple[str, ...] = ()
    """Which models made the scores: one for alignment, one for identity."""


@dataclass(frozen=True)
class Saved:
    """A checkpoint was written: a killed run loses nothing before ``step``."""

    step: int


@dataclass(frozen=True)
class Finished:
    """The run reached its last step; ``result`` is what the task's ``finish`` returned (JSON values)."""

    result: Mapping[str, object]


@dataclass(frozen=True)
class Failed:
    """The run ended early; ``reason`` is a sentence for the user."""

    reason: str


Event = Progress | LogLine | Sample | Saved | Finished | Failed


class Sink(Protocol):
    """Where events go: a terminal, the job database, a list in a test."""

    def emit(self, event: Event) -> None:
        """Take one event; must not raise for an event it does not care about."""
        ...


class SinkGroup:
    """Hands every event to all of its sinks, in their order; without any, nobody listens."""

    def __init__(self, *sinks: Sink) -> None:
        self.sinks = sinks

    def emit(self, event: Event) -> None:
        """Hand ``event`` on."""
        for sink in self.sinks:
            sink.emit(event)


class MemorySink:
    """Keeps every event in a list."""

    def __init__(self) -> None:
        self.events: list[Event] = []

    def emit(self, event: Event) -> None:
        """Append ``event``."""
        self.events.append(event)

    def of(self, kind: type) -> list:
        """The events of one class, in order."""
        return [event for event in self.events if isinstance(event, kind)]
