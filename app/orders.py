"""From the words of a visitor or a program to orders that can be carried out."""

from __future__ import annotations

from collections.abc import Sequence

from app.plan import METHODS, Order, Subject
from app.services import Services
from mole_diffusion.errors import InvalidRequest

__all__ = ["orders_for"]


def orders_for(
    services: Services, owner: str, *, base: str, experts: Sequence[str], method: str, prompt: str, beside: bool,
    seed: int, steps: int, guidance: float, count: int, negative: str, left_out: Sequence[str],
) -> list[Order]:  # fmt: skip
    """The orders of one press of the button: the method's, and NLA's where it is asked for beside it.

    Raises InvalidRequest for an unknown method or subject.
    """
    if method not in METHODS:
        raise InvalidRequest(f"The method is one of {', '.join(METHODS)}, but it was {method!r}.")
    if base not in services.settings.base_names:
        raise InvalidRequest(f"The base is one of {', '.join(services.settings.base_names)}, but it was {base!r}.")
    entries = [services.library.get(sha256, owner) for sha256 in experts]
    trained = services.compositions.for_subjects(list(experts), owner) if method == "gates" else None
    if trained is not None:
        entries.sort(key=lambda entry: trained.experts.index(entry.sha256))
    order = Order(
        base=base, subjects=tuple(Subject.of(entry) for entry in entries), method=method, prompt=prompt,  # type: ignore[arg-type]
        negative=negative, seed=seed, steps=steps, guidance=guidance, count=count,
        composition=trained.path if trained else None, left_out=tuple(left_out),
    )  # fmt: skip
    return [order, order.by("nla")] if beside and method != "nla" else [order]
