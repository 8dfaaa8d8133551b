"""Makes pictures: one at a time, with the base of the last picture kept in memory."""

from __future__ import annotations

import logging
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from app.plan import Order, Subject, check
from app.scorer import Identity, Scorer
from mole_diffusion.errors import BaseMismatch, Cancelled, MoleError

if TYPE_CHECKING:
    from PIL import Image

    from mole_diffusion.bases.base import Base
    from mole_diffusion.composition import Composition
    from mole_diffusion.experts import Expert
    from mole_diffusion.generation import GenerationRequest, StepEvent

__all__ = ["Generator", "Rendered"]

logger = logging.getLogger(__name__)
KEPT_EXPERTS = 8
LOOK = 0.2
"""Seconds between two looks at a cancel while a picture waits for its turn."""


@dataclass(frozen=True)
class Rendered:
    """The pictures of one order and what was measured on them.

    Attributes:
        alignment: per picture, image-text similarity keyed "prompt" and by subject.
        identity: per picture, per subject with views.
        parameters: per picture, what its PNG carries.
        labels: the names of the models behind the two scores.
        unscored: why nothing was measured, as a sentence; empty where it was.
    """

    images: list[Image.Image]
    alignment: list[dict[str, float]]
    identity: list[dict[str, Identity]]
    parameters: list[dict[str, Any]]
    labels: dict[str, str] = field(default_factory=dict)
    unscored: str = ""


class Generator:
    """Loads bases lazily behind a lock; pictures queue up for it.

    Args:
        device: torch device or "auto".
        scorer: measures alignment and identity.
    """

    def __init__(self, device: str, scorer: Scorer) -> None:
        self._device = device
        self._scorer = scorer
        self._lock = threading.Lock()
        self._loaded: tuple[str, Any] | None = None
        self._experts: OrderedDict[tuple[str, str, str], Expert] = OrderedDict()

    @property
    def busy(self) -> bool:
        """Whether a picture is being made right now."""
        return self._lock.locked()

    def warm_up(self, base: str) -> None:
        """Load a base and its scorer before the first visitor asks; a failure is only logged."""
        try:
            with self._lock:
                loaded, _pipe = self._load(base)
                self._scorer.alignment(loaded, self._placement().device)
        except Exception as error:  # noqa: BLE001 - the first picture will tell the visitor the same
            logger.warning("The base %s could not be loaded ahead of time: %s", base, error)

    def render(
        self,
        order: Order,
        on_step: Callable[[StepEvent], None] | None = None,
        cancel: threading.Event | None = None,
        say: Callable[[str], None] = lambda text: None,
    ) -> Rendered:
        """Make the pictures of ``order``. Raises MoleError with a sentence, Cancelled when ``cancel`` was set.

        ``say`` is told in a few words what the visitor is waiting for.
        """
        from mole_diffusion.generation import generate

        check(order)
        if self.busy:
            say("Waiting for the picture before")
        with self._turn(cancel):
            say("Loading the base" if self._loaded is None or self._loaded[0] != order.base else "Starting")
            base, pipe = self._load(order.base)
            alignment, unscored = self._alignment(base)
            with self._attached(order, base, pipe) as composition:
                result = generate(
                    pipe, base, _request(order), composition=composition, scorer=alignment, on_step=on_step,
                    cancel=cancel,
                )  # fmt: skip
            present = [subject for subject in order.subjects if subject.name not in order.left_out]
            labels, identity = self._identity(result.images, present, alignment)
        parameters = [
            {**result.parameters_of(index), "method": order.method, "identity": _noted(found, labels.get("identity"))}
            for index, found in enumerate(identity)
        ]
        return Rendered(list(result.images), list(result.scores), identity, parameters, labels, unscored)

    # -- inside ------------------------------------------------------------------------------------------------

    @contextmanager
    def _turn(self, cancel: threading.Event | None) -> Iterator[None]:
        """Hold the lock; a cancel is heard while somebody else still holds it."""
        while not self._lock.acquire(timeout=LOOK):
            _check_cancel(cancel)
        try:
            _check_cancel(cancel)
            yield
        finally:
            self._lock.release()

    def _alignment(self, base: Base) -> tuple[Any, str]:
        """(the base's scorer, ""), or (None, why there is none): a picture without scores is better than none."""
        try:
            return self._scorer.alignment(base, self._placement().device), ""
        except MoleError as error:
            return None, str(error)

    def _identity(
        self, images: Sequence[Image.Image], subjects: Sequence[Subject], alignment: Any
    ) -> tuple[dict[str, str], list[dict[str, Identity]]]:
        """The names of the scorers, and identity per picture; both empty without a scorer."""
        if alignment is None:
            return {}, [{} for _image in images]
        labels = {"alignment": alignment.label, "identity": self._scorer.identity_label(alignment)}
        return labels, [self._scorer.identity(image, subjects, alignment) for image in images]

    def _placement(self) -> Any:
        from mole_diffusion.bases import choose_placement

        return choose_placement(None if self._device == "auto" else self._device)

    def _load(self, name: str) -> tuple[Base, Any]:
        from mole_diffusion.bases import get_base

        base = get_base(name)
        if self._loaded is None or self._loaded[0] != name:
            self._loaded = None
            placement = self._placement()
            self._loaded = (name, base.load(placement.device, placement.dtype))
        return base, self._loaded[1]

    def _attached(self, order: Order, base: Base, pipe: Any) -> Composition:
        experts = [self._expert(s.path, s.name, s.trigger) for s in order.subjects]
        for expert in experts:
            if expert.base not in (None, base.family):
                raise BaseMismatch(
                    f"“{expert.name}” was made for {expert.base}, but the base chosen is {base.title}; "
                    "choose a subject of this base or another base."
                )
        composition = _composed(order, base, pipe, experts)
        names = {expert.sha256: expert.name for expert in composition.experts}
        left_out = [names[subject.sha256] for subject in order.subjects if subject.name in order.left_out]
        if left_out:
            composition.mask(*left_out)
        return composition

    def _expert(self, path: Path, name: str, trigger: str) -> Expert:
        from mole_diffusion.experts import Expert

        key = (str(path), name, trigger)
        if key not in self._experts:
            self._experts[key] = replace(Expert.load(path), name=name, trigger=trigger or None)
        self._experts.move_to_end(key)
        while len(self._experts) > KEPT_EXPERTS:
            self._experts.popitem(last=False)
        return self._experts[key]


def _composed(order: Order, base: Base, pipe: Any, experts: list[Expert]) -> Any:
    from mole_diffusion import TriggerSpans, compose, load_composition
    from mole_diffusion.composition import nla, weighted_sum

    if order.method == "gates" and order.composition is not None:
        return load_composition(order.composition, pipe, {expert.sha256: expert for expert in experts}, base)
    gate = {
        "nla": lambda: nla(len(experts)),
        "sum": lambda: weighted_sum(len(experts)),
        "spans": TriggerSpans,
    }[order.method]()
    return compose(pipe, experts, gate=gate, base=base)


def _request(order: Order) -> GenerationRequest:
    from mole_diffusion.generation import GenerationRequest, SubjectPrompt

    return GenerationRequest(
        prompt=order.prompt.strip(),
        negative=order.negative.strip(),
        seed=order.seed,
        steps=order.steps,
        guidance=order.guidance,
        count=order.count,
        subjects=tuple(SubjectPrompt(subject.name, subject.text) for subject in order.subjects),
    )


def _check_cancel(cancel: threading.Event | None) -> None:
    if cancel is not None and cancel.is_set():
        raise Cancelled("The picture was stopped before its turn came.")


def _noted(found: dict[str, Identity], label: str | None) -> dict[str, Any]:
    return {"scorer": label, **{name: round(each.score, 4) for name, each in found.items()}}
