"""From the words of a visitor or a program to orders that can be carried out."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from app.plan import METHODS, Order, Subject
from app.services import Services
from mole_diffusion.errors import InvalidRequest

__all__ = ["orders_for"]


def orders_for(
    services: Services, owner: str, *, base: str, experts: Sequence[str], method: str, prompt: str, beside: bool,
    seed: float | None, steps: float | None, guidance: float | None, count: float | None, negative: str | None,
    left_out: Sequence[str] | None, wanted: Path | None = None,
) -> list[Order]:  # fmt: skip
    """The orders of one press of the button: the method's, and NLA's where it is asked for beside it.

    A number that is None, as from an emptied field, is the base's own or the usual one. ``wanted`` is the file of the
    gates that were chosen; the newest ones serve where it holds none for these subjects.
    Raises InvalidRequest for an unknown method or subject.
    """
    from mole_diffusion.bases import get_base

    if method not in METHODS:
        raise InvalidRequest(f"The method is one of {', '.join(METHODS)}, but it was {method!r}.")
    if base not in services.settings.base_names:
        raise InvalidRequest(f"The base is one of {', '.join(services.settings.base_names)}, but it was {base!r}.")
    usual = get_base(base)
    entries = [services.library.get(sha256, owner) for sha256 in experts]
    trained = services.compositions.for_subjects(experts, owner, wanted) if method == "gates" else None
    if trained is not None:
        entries.sort(key=lambda entry: trained.experts.index(entry.sha256))
    order = Order(
        base=base, subjects=tuple(Subject.of(entry) for entry in entries), method=method, prompt=prompt,  # type: ignore[arg-type]
        negative=negative or "", seed=int(seed or 0), count=1 if count is None else int(count),
        steps=usual.default_steps if steps is None else int(steps),
        guidance=usual.default_guidance if guidance is None else float(guidance),
        composition=trained.path if trained else None, left_out=tuple(left_out or ()),
    )  # fmt: skip
    return [order, order.by("nla")] if beside and method != "nla" else [order]
