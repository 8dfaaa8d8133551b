"""How to train a router."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from training.config import check, check_range
from training.objectives.denoise import Precision
from training.tasks.gate_config import ExpertEntry

if TYPE_CHECKING:
    from mole_diffusion.gates import RouterConfig


@dataclass(frozen=True)
class RouterTrainingConfig:
    """How to train a router. Unknown keys and values out of range raise InvalidRequest."""

    base: str
    """Name of the base, or a pipeline folder."""
    experts: tuple[ExpertEntry, ...] = ()
    rank: int = 8
    """Of the routers' A_r and B_r."""
    scope: Literal["token", "sample"] = "token"
    steps: int = 600
    batch: int | None = None
    """Scenes a step; None: 12 for the demo base, 2 for full-size ones."""
    lr: float | None = None
    """Adam's learning rate; None: 2e-3 for the demo base, 1e-4 for full-size ones."""
    group: int = 4
    """Experts that a step holds: a step costs what a composition of so many costs."""
    dropout: float = 0.5
    """Chance that an expert which the scene does not name is absent from a row of the batch."""
    distractors: int = 2
    """At most so many experts that the scene does not name are there in a row."""
    held_out: float = 0.2
    """Share of the experts that no step uses: pairs of them say how well the router takes experts it never saw."""
    pool: int = 576
    """Training scenes, encoded before the first step; every twelve of them show one group of experts."""
    subject_weight: float = 1.0
    """Weight of places that show a subject beside 1 for the background."""
    validation: int = 24
    """Scenes of held-out pairs; 0: no validation, no expert is held out, the last router is saved."""
    validate_every: int = 100
    seed: int = 0
    resolution: int | None = None
    """Side of the scenes in pixels; None: the base's."""
    precision: Precision | None = None
    """Of a training step; None: bfloat16 for full-size bases on a GPU, else float32. Routers stay float32."""
    self_views: int = 12
    """Pictures that an expert without pictures makes of its subject."""

    def __post_init__(self) -> None:
        for name, low, high in _RANGES:
            check_range(name, getattr(self, name), low, high)
        for name, low, high in (("batch", 1, 64), ("lr", 1e-8, 1.0), ("resolution", 8, 2048)):
            if getattr(self, name) is not None:
                check_range(name, getattr(self, name), low, high)

    def gate(self) -> RouterConfig:
        """What experts are composed with."""
        from mole_diffusion.gates import RouterConfig

        return RouterConfig(rank=self.rank, scope=self.scope)

    def split(self, count: int) -> int:
        """How many of ``count`` experts are held out. Raises InvalidRequest where too few are left on a side."""
        held = round(self.held_out * count) if self.validation else 0
        check(
            not self.validation or held >= 2,
            f"Of {count} experts, held_out {self.held_out:g} leaves {held} for the validation, which needs two: give "
            "more experts or a larger held_out, or switch the validation off.",
        )
        check(
            count - held >= self.group,
            f"A step holds {self.group} experts, but only {count - held} of {count} are trained on: give more experts, "
            "or make group or held_out smaller.",
        )
        return held


_RANGES = (
    ("rank", 1, 1024), ("steps", 1, 100_000), ("group", 2, 32), ("dropout", 0, 1), ("distractors", 0, 31),
    ("held_out", 0, 0.9), ("pool", 1, 65_536), ("subject_weight", 0.01, 100),
    ("validation", 0, 1024), ("validate_every", 1, 100_000), ("seed", 0, 2**31), ("self_views", 2, 64),
)  # fmt: skip
