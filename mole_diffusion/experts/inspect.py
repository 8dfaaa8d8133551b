"""What is this file, and does it fit? Answers for people, the command line and the page."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

from mole_diffusion.errors import BaseMismatch, InvalidFile, MoleError
from mole_diffusion.experts.canonical import Expert
from mole_diffusion.experts.embeddings import find_misfit as find_token_misfit
from mole_diffusion.experts.load import Opened, open_lora, to_expert
from mole_diffusion.experts.names import ModuleShapes, align
from mole_diffusion.experts.peft_folder import weights_of
from mole_diffusion.experts.recognise import refuse_unmatched
from mole_diffusion.experts.safefile import Source, read_header
from mole_diffusion.experts.sniff import describe_size


class HasShapes(Protocol):
    """The part of a base that inspection needs."""

    @property
    def title(self) -> str: ...

    @property
    def family(self) -> str: ...

    def module_shapes(self) -> ModuleShapes:
        """Weight shapes keyed as experts key their modules."""
        ...


@dataclass(frozen=True)
class Inspection:
    """The result of looking at one file. ``ok`` = usable as an expert (of the given base, if one was given).

    ``error`` is the largest relative error of ``approximated`` modules, None where only the header was read and nobody
    knows; ``dora`` counts modules with a magnitude; ``embeddings`` has the vectors of each token, ``embeddings_from``
    the file beside the LoRA that they came from.
    """

    ok: bool
    reason: str
    size: int = 0
    sha256: str | None = None
    layout: str | None = None
    producer: str | None = None
    base: str | None = None
    fits: str | None = None
    trigger: str | None = None
    role: str | None = None
    ranks: dict[int, int] = field(default_factory=dict)
    alphas: dict[str, int] = field(default_factory=dict)
    targets: dict[str, int] = field(default_factory=dict)
    matched: int = 0
    unmatched: int = 0
    approximated: int = 0
    error: float | None = 0.0
    examples: tuple[str, ...] = ()
    dora: int = 0
    embeddings: dict[str, int] = field(default_factory=dict)
    embeddings_from: str | None = None
    header_only: bool = False

    def sentence(self) -> str:
        """One line for a person."""
        if not self.ok:
            return self.reason
        ranks = ", ".join(str(rank) for rank in self.ranks)
        targets = ", ".join(f"{count} in {component}" for component, count in self.targets.items())
        base = self.fits or self.base or "an unknown base"
        trigger = f"trigger {self.trigger!r}" if self.trigger else "no trigger word stated"
        kind = "DoRA" if self.dora else "LoRA"
        size = describe_size(self.size)
        return (
            f"A {kind} for {base}: rank {ranks}, {targets}{self._near()}{self._tokens()}, {trigger}, {size} "
            f"({self.producer})."
        )

    def _near(self) -> str:
        if not self.approximated:
            return ""
        near = f", {self.approximated} of {self.matched_modules} modules as their nearest pair"
        return f"{near}, up to {self.error:.1%} off" if self.error is not None else near

    def _tokens(self) -> str:
        if not self.embeddings:
            return ""
        source = f" from {self.embeddings_from}" if self.embeddings_from else ""
        return f", embeddings of {', '.join(self.embeddings)}{source}"

    @property
    def matched_modules(self) -> int:
        """Modules that it changes."""
        return sum(self.targets.values())

    def to_json(self) -> dict[str, Any]:
        """Plain values for ``json.dumps``."""
        content = asdict(self)
        return {**content, "ranks": {str(rank): count for rank, count in self.ranks.items()}}


def inspect_file(
    source: Source,
    base: HasShapes | None = None,
    *,
    embeddings: Source | bool = True,
    header_only: bool = False,
) -> Inspection:
    """Look at a file; never raises for what is in it.

    Args:
        source: as for :meth:`mole_diffusion.experts.Expert.load`, with its ``embeddings``.
        base: compare with this base's layers and text encoders.
        embeddings: the same as there.
        header_only: by names, shapes and alphas alone, without reading weights; NaN and products that are not low-rank
            are not noticed then.
    """
    shapes = base.module_shapes() if base is not None else None
    try:
        opened = open_lora(source, shapes, embeddings=embeddings, header_only=header_only)
    except InvalidFile as error:
        return Inspection(False, str(error), size=_size(source))
    except OSError as error:
        return Inspection(False, f"Cannot read the file: {error.strerror or error}.")
    return _judge(opened, base, header_only)


def check_fits(expert: Expert, base: HasShapes) -> None:
    """Compare every module of an expert with the base's weight shapes.

    Raises:
        BaseMismatch: names the first module that is missing or has another shape, and what the expert seems made for.
    """
    misfit = find_misfit(expert, base.module_shapes())
    if misfit:
        made_for = f" It was made for {expert.base}." if expert.base and expert.base != base.family else ""
        raise BaseMismatch(f"The LoRA {expert.name!r} does not fit {base.title}: {misfit}.{made_for}")


def find_misfit(expert: Expert, shapes: ModuleShapes) -> str | None:
    """Why the expert does not fit, None where it does."""
    missing, wrong = [], []
    for key, pair in expert.modules.items():
        name = align(key, shapes)
        if name is None:
            missing.append(key)
        elif pair.reshaped(tuple(shapes[name])) is None:
            wrong.append(f"{key} needs {tuple(shapes[name])} and gets {pair.weight_shape}")
    if wrong:
        return f"{len(wrong)} of {len(expert.modules)} modules have another shape ({wrong[0]})"
    if missing:
        return f"{len(missing)} of {len(expert.modules)} modules do not exist there ({missing[0]})"
    return find_token_misfit(expert.embeddings, shapes)


def _judge(opened: Opened, base: HasShapes | None, header_only: bool) -> Inspection:
    converted, reason, expert = opened.converted, "", None
    try:
        refuse_unmatched(converted.unmatched, len(opened.header.tensors) - len(converted.unmatched))
        expert = to_expert(opened, name="this file")
        if base is not None:
            check_fits(expert, base)
    except MoleError as error:
        reason = str(error)
    return Inspection(
        ok=not reason,
        reason=reason,
        size=opened.header.size,
        sha256=opened.sha256,
        layout=opened.layout,
        producer=expert.producer if expert else None,
        base=expert.base if expert else None,
        fits=base.title if base is not None and not reason else None,
        trigger=expert.trigger if expert else None,
        role=expert.role if expert else None,
        ranks=dict(sorted(Counter(pair.rank for pair in converted.modules.values()).items())),
        alphas=dict(Counter(f"{alpha:g}" for alpha in converted.alphas.values())),
        targets=dict(Counter(key.split(".", 1)[0] for key in converted.modules)),
        matched=len(opened.header.tensors) - len(converted.unmatched),
        unmatched=len(converted.unmatched),
        approximated=len(converted.errors),
        error=None if any(map(math.isnan, converted.errors.values())) else max(converted.errors.values(), default=0.0),
        examples=tuple(key[:200] for key in converted.unmatched[:3]),
        dora=sum(pair.magnitude is not None for pair in converted.modules.values()),
        embeddings={token: len(next(iter(parts.values()))) for token, parts in opened.embeddings.items()},
        embeddings_from=opened.embeddings_from,
        header_only=header_only,
    )


def _size(source: Source) -> int:
    if isinstance(source, bytes):
        return len(source)
    try:
        return read_header(weights_of(source)).size
    except MoleError:
        return Path(source).stat().st_size if Path(source).is_file() else 0
