"""What an image-text model calls a subject: class words, for it has never heard of triggers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from training.data.subjects import Subject

if TYPE_CHECKING:
    from mole_diffusion import Expert
    from training.tasks.gate_config import ExpertEntry


def class_words(
    entries: Sequence[ExpertEntry], experts: Sequence[Expert], subjects: Sequence[Subject]
) -> tuple[str, ...]:
    """The class of each subject as its entry or its expert names it, else its phrase without the trigger.

    A trigger that holds the class ("zwx robot") and an expert that does not say so leave the whole phrase.
    """
    named = {entry.name: entry.class_name for entry in entries}
    return tuple(
        named.get(expert.name) or expert.metadata.get("mole.class") or _without(subject.phrase, expert.trigger)
        for expert, subject in zip(experts, subjects, strict=True)
    )


def _without(phrase: str, trigger: str | None) -> str:
    words, known = phrase.split(), {word.lower() for word in (trigger or "").split()}
    return " ".join(word for word in words if word.lower() not in known) or phrase
