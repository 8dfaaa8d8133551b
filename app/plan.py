"""One picture to be made, as plain data: it can be stored, compared and sent to another process."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from app.records import Entry
from mole_diffusion.errors import InvalidRequest

__all__ = ["METHODS", "Method", "Order", "Subject", "check", "default_prompt", "words_for"]

Method = Literal["gates", "nla", "sum", "spans"]
METHODS: dict[Method, str] = {
    "gates": "Learned gates",
    "spans": "Trigger spans",
    "nla": "NLA",
    "sum": "Sum",
}
"""Names shown on the page. NLA = normalised linear arithmetic (MoLE, arXiv 2404.13628, Eq. 2); sum = Eq. 1."""

PLACES = {"demo": "on a green background"}
"""Where a first picture shows its subjects, by base family: the small demo base is at its best on plain grounds."""
PLACE = "on a beach"


@dataclass(frozen=True)
class Subject:
    """An expert inside an order.

    Attributes:
        text: what image-text alignment compares the picture with, in plain words.
        views: pictures that identity is scored against; may be empty.
    """

    sha256: str
    name: str
    trigger: str
    text: str
    path: Path
    views: tuple[Path, ...] = ()

    @classmethod
    def of(cls, entry: Entry) -> Subject:
        """A library entry as part of an order."""
        return cls(entry.sha256, entry.name, entry.trigger, words_for(entry), entry.path, entry.views)


@dataclass(frozen=True)
class Order:
    """Everything that decides a picture. Two equal orders give equal pixels on one machine.

    Attributes:
        composition: file with trained gates; needed by method "gates".
        left_out: names of subjects that are masked; the rest is renormalised.
    """

    base: str
    subjects: tuple[Subject, ...]
    method: Method
    prompt: str
    negative: str = ""
    seed: int = 0
    steps: int = 25
    guidance: float = 5.0
    count: int = 1
    composition: Path | None = None
    left_out: tuple[str, ...] = ()

    def by(self, method: Method) -> Order:
        """The same order by another method."""
        return replace(self, method=method, composition=self.composition if method == "gates" else None)


def check(order: Order) -> Order:
    """The order itself. Raises InvalidRequest with a sentence when it cannot be carried out."""
    if not order.subjects:
        raise InvalidRequest("Choose at least one subject; none is chosen.")
    if not order.prompt.strip():
        raise InvalidRequest("The prompt is empty; describe the picture, with the trigger of each subject in it.")
    if order.method == "gates" and order.composition is None:
        raise InvalidRequest("No gates are trained for these subjects yet; train them, or choose another method.")
    if not 1 <= order.steps <= 200:
        raise InvalidRequest(f"Between 1 and 200 steps are possible; {order.steps} were asked for.")
    if not 1 <= order.count <= 8:
        raise InvalidRequest(f"Between 1 and 8 pictures are made at once; {order.count} were asked for.")
    if not 0 <= order.guidance <= 30:
        raise InvalidRequest(f"Guidance lies between 0 and 30; {order.guidance:g} was asked for.")
    if not 0 <= order.seed < 2**32:
        raise InvalidRequest(f"The seed is a whole number from 0 to 4294967295; {order.seed} was asked for.")
    names = {subject.name for subject in order.subjects}
    if len(names) < len(order.subjects):
        raise InvalidRequest("Two of the subjects have the same name; rename one of them in the library.")
    if names <= set(order.left_out):
        raise InvalidRequest("Every subject is left out; keep at least one.")
    return order


def words_for(entry: Entry) -> str:
    """How a picture of the subject is described to an image-text model that has never met its trigger."""
    words = entry.subject_class or entry.trigger or entry.name
    return f"{article(words)} {words}"


def subject_phrase(entry: Entry) -> str:
    """Trigger and class as one phrase, the class only where the trigger does not contain it."""
    trigger, words = entry.trigger.strip(), entry.subject_class.strip()
    if not trigger:
        return words or entry.name
    return trigger if not words or words.lower() in trigger.lower() else f"{trigger} {words}"


def default_prompt(entries: list[Entry]) -> str:
    """A prompt that names every subject once, each by its trigger."""
    phrases = [subject_phrase(entry) for entry in entries]
    if not phrases:
        return ""
    named = [f"{article(phrase)} {phrase}" for phrase in phrases]
    joined = named[0] if len(named) == 1 else ", ".join(named[:-1]) + " and " + named[-1]
    return f"{joined} {PLACES.get(entries[0].family, PLACE)}"


def article(words: str) -> str:
    """ "a" or "an"."""
    return "an" if words[:1].lower() in "aeiou" else "a"
