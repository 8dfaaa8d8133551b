"""What can be asked of gate training: frozen settings; unknown keys, values out of range and contradictions raise."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any, Literal

from training.config import check, check_range
from training.objectives.denoise import Precision

if TYPE_CHECKING:
    from mole_diffusion.gates.config import AnyGate

PATIENCE = 4
"""Validations without a better score after which training ends, unless the settings say otherwise."""


@dataclass(frozen=True)
class ExpertEntry:
    """One expert of a gate job, as the job's configuration names it."""

    sha256: str
    name: str
    trigger: str | None = None
    class_name: str | None = field(default=None, metadata={"key": "class"})
    views: str | None = None
    """Folder of its pictures below the data folder or the assets; None: what the library holds, or its own pictures."""


@dataclass(frozen=True)
class GateTrainingConfig:
    """How to train gates. Unknown keys, values out of range and settings without effect raise InvalidRequest."""

    base: str
    """Name of the base, or a pipeline folder."""
    experts: tuple[ExpertEntry, ...] = ()
    method: Literal["learned", "static"] = "learned"
    """Gates that look at their input, or one learned weight vector per block (the baseline)."""
    scope: Literal["sample", "token"] = "sample"
    scale: Literal["softmax", "null", "sigmoid"] = "softmax"
    gain: bool = False
    objective: Literal["collage", "clip", "both"] = "collage"
    """Denoise collages; or please an image-text model (arXiv 2404.13628); or L_collage + clip_weight·L_clip."""
    steps: int = 300
    batch: int | None = None
    """Scenes a step; None: 12 for the demo base, the paper's 2 for full-size ones."""
    lr: float | None = None
    """Adam's learning rate; None: 2e-3 for the demo base, the paper's 1e-5 for full-size ones."""
    balance: Literal["mole", "entropy", "none"] = "mole"
    """L_balance (Eq. 14-15); the negative entropy of the same mean gate, which is bounded; or neither."""
    alpha: float = 0.5
    """Weight of the balance loss (Eq. 16); 0 switches it off."""
    subject_weight: float = 1.0
    """Weight, in the collage loss, of places that show a subject beside 1 for the background."""
    prompt_dropout: float = 0.0
    """Chance of an empty prompt; needed only where unconditional rows compute their own gates."""
    clip_model: str | None = None
    """Image-text model that trains (``local-dir:`` folder, or an open_clip ``<model>:<tag>``); None: by base."""
    clip_weight: float = 0.1
    """Weight of L_clip beside L_collage, of the objective "both"."""
    clip_global: float = 1.0
    """Weight in L_clip of picture against prompt."""
    clip_local: float = 1.0
    """Weight in L_clip of each subject's place against its class."""
    clip_direction: float = 0.5
    """Weight in L_clip of the change from a subject's pictures to the scene against the change of the words."""
    clip_from: float = 0.0
    clip_until: float = 0.7
    """L_clip sees timesteps in this part of the schedule, 0 = clean. Beyond 0.7 the noise is over three times the
    signal (√ᾱ < 0.29 in Stable Diffusion): x̂0 is a blur there, and of a base that predicts noise error at large."""
    clip_side: int | None = None
    """Side in pixels at which x̂0 is decoded for L_clip; None: the base's, at most 256."""
    seed: int = 0
    resolution: int | None = None
    """Side of the scenes in pixels; None: the base's."""
    precision: Precision | None = None
    """Of a training step; None: bfloat16 for full-size bases on a GPU, else float32. Gates stay float32."""
    pool: int = 192
    """Training scenes, encoded before the first step."""
    validation: int = 24
    """Held-out scenes; 0: no held-out loss."""
    validate_every: int = 50
    validate_prompts: int = 4
    """Pictures of a validation; 0: none. By passes of the UNet, four of them cost as much as three steps of the demo
    base or twelve of a full-size one."""
    validate_picture_steps: int = 12
    """Denoising steps of each."""
    stop_on: Literal["score", "loss"] | None = None
    """What says which gates are best, and when to end: the score of the validation's pictures, by a model that did not
    train; or the held-out collage loss. None: the score where there is such a model and validate_prompts, else the
    loss. Without validations the last gates are saved."""
    patience: int | None = None
    """Validations without improvement after which training ends; 0: never; None: 4 on the score, never on the loss."""
    self_views: int = 12
    """Pictures that an expert without pictures makes of its subject."""

    def __post_init__(self) -> None:
        for name, low, high in _RANGES:
            if getattr(self, name) is not None:
                check_range(name, getattr(self, name), low, high)
        looks = (self.scope, self.scale, self.gain) != ("sample", "softmax", False)
        check(self.method == "learned" or not looks, "Static weights have no scope, scale or gain; leave them out.")
        check(self.clip_from < self.clip_until, "clip_from lies below clip_until: L_clip needs some timesteps.")
        terms = self.clip_global + self.clip_local + self.clip_direction
        check(terms > 0, "Every term of L_clip has the weight 0; give one of them more.")
        _check_used(self, self.objective != "collage", "clip_", "the objective clip or both", but="clip_weight")
        _check_used(self, self.objective == "both", "clip_weight", "the objective both")
        _check_used(self, self.objective != "clip", "subject_weight", "the objective collage or both")
        asked = self.stop_on == "score"
        check(not asked or self.validate_prompts > 0, "Stopping on the score needs validate_prompts of 1 or more.")
        asked = self.stop_on == "loss"
        check(not asked or self.validation > 0, "Stopping on the loss needs held-out scenes: validation of 1 or more.")
        judged = self.validation > 0 or self.validate_prompts > 0
        check(judged or not self.patience, "Patience needs validations: validation or validate_prompts of 1 or more.")

    def gate(self, count: int) -> AnyGate:
        """What to compose ``count`` experts with."""
        from mole_diffusion.gates import GateConfig, learned_static

        if self.method == "static":
            return learned_static(count)
        return GateConfig(scope=self.scope, scale=self.scale, gain=self.gain)

    @property
    def clip_terms(self) -> tuple[float, float, float]:
        """Weights of (global, local, direction)."""
        return self.clip_global, self.clip_local, self.clip_direction


_RANGES = (
    ("steps", 1, 100_000), ("alpha", 0, 100), ("subject_weight", 0.01, 100), ("prompt_dropout", 0, 0.9),
    ("seed", 0, 2**31), ("pool", 1, 4096), ("validation", 0, 1024), ("validate_every", 1, 100_000),
    ("self_views", 2, 64), ("clip_weight", 1e-6, 1e3), ("clip_global", 0, 100), ("clip_local", 0, 100),
    ("clip_direction", 0, 100), ("clip_from", 0, 1), ("clip_until", 0, 1), ("clip_side", 8, 2048),
    ("validate_prompts", 0, 64), ("validate_picture_steps", 1, 1000), ("patience", 0, 100_000),
    ("batch", 1, 64), ("lr", 1e-8, 1.0), ("resolution", 8, 2048),
)  # fmt: skip


def _check_used(config: GateTrainingConfig, used: bool, prefix: str, where: str, but: str = "") -> None:
    """Raise where a setting was given that has no effect."""
    for item in fields(config) if not used else ():
        given: Any = getattr(config, item.name)
        odd = item.name.startswith(prefix) and item.name != but and given != item.default
        check(not odd, f"{item.name} is a setting of {where}; leave it out here.")
