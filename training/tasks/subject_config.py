"""What to train for ``subject``: every setting with its range and its default."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from training.config import check, check_range, parse
from training.objectives.denoise import Precision
from training.optimisers import OptimiserName, ScheduleName
from training.presets import preset

Mixer = Literal["orthogonal", "kaiming", "normal", "identity", "butterfly"]

LEARNING_RATES, LEARNING_RATE = {"demo": 1e-3}, 1e-4
BATCHES, BATCH = {"demo": 8}, 4


@dataclass(frozen=True)
class SubjectConfig:
    """What to train. Unknown keys and values out of range raise InvalidRequest."""

    base: str
    """Name of the base, or a pipeline folder."""
    token: str
    """The new word for the subject, for instance "zwx"."""
    class_name: str = field(metadata={"key": "class"})
    """What it is, for instance "robot"."""
    name: str = ""
    """The expert's title in the file; empty: the file's name."""
    adapter: Literal["lora", "moslora"] = "lora"
    """LoRA (arXiv 2106.09685), or MoSLoRA (arXiv 2406.11909), whose mixer is folded into the file."""
    mixer: Mixer | None = None
    """How MoSLoRA's mixer starts; None: orthogonal. A butterfly stays as it is."""
    targets: Literal["all", "attention"] | None = None
    """Which modules of the UNet learn: its attention projections, or feed-forward and convolutions too; None: the
    base's own choice, all for the demo base, attention for full-size ones."""
    train_text_encoders: bool = False
    """Train the attention of all the base's text encoders too; they then run in every step."""
    text_lr: float | None = None
    """Learning rate of the text encoders; None: half of the UNet's."""
    rank: int = 16
    alpha: int | None = None
    """LoRA's α; None: the rank, so that the scale is 1."""
    steps: int = 400
    batch: int | None = None
    """Pictures at once; None: 8 for the demo base, 4 for full-size ones."""
    accumulate: int = 1
    """Batches whose gradients make one step."""
    lr: float | None = None
    """Learning rate; None: 1e-3 for the demo base, 1e-4 for full-size ones."""
    seed: int = 0
    resolution: int | None = None
    """Side of the training pictures in pixels; None: the base's."""
    precision: Precision | None = None
    """Of a training step; None: bfloat16 for full-size bases on a GPU, else float32. Weights train in float32."""
    checkpointing: bool | None = None
    """Compute the UNet's activations twice instead of keeping them; None: for full-size bases on a GPU."""
    offload: bool = False
    """What a step does not need (autoencoder, text encoders that do not learn) waits in the machine's memory."""
    optimiser: OptimiserName = "adamw"
    """AdamW, or with its moments in 8 bits (bitsandbytes), which pays for large ranks."""
    schedule: ScheduleName = "constant"
    """The learning rate after the warm-up: stays, or falls along a cosine."""
    warmup: int = 0
    """Steps in which the learning rate rises."""
    snr_gamma: float | None = None
    """γ of min-SNR weighting (arXiv 2303.09556); None: plain mean."""
    captions: Literal["given", "auto", "off"] = "given"
    """Captions of photos: those in .txt files or metadata.jsonl beside them; with auto a model writes the others."""
    flip: bool = False
    """Mirror half of the pictures: never for writing, or for a subject with a left and a right."""
    pool: int = 256
    """Different augmented pictures that are encoded before the first step."""
    prior_pictures: int = 0
    """Pictures of the class that the base makes for prior preservation; 0: none."""
    prior_weight: float = 1.0
    """Weight of the prior's loss beside the subject's."""

    def __post_init__(self) -> None:
        check(bool(self.token.strip()), "A subject needs a token, the word that will call it.")
        check(len(self.token) <= 64 and len(self.class_name) <= 64, "Token and class have at most 64 characters.")
        for name, (low, high) in _RANGES.items():
            if getattr(self, name) is not None:
                check_range(name, getattr(self, name), low, high)
        check(self.adapter == "moslora" or self.mixer is None, "Only the adapter moslora has a mixer; leave it out.")
        check(self.warmup <= self.steps, f"warmup is at most the number of steps, {self.steps}, not {self.warmup}.")
        odd = self.mixer == "butterfly" and self.rank % 2
        check(not odd, f"A butterfly mixer halves the rank: rank is even, not {self.rank}.")
        check(
            self.train_text_encoders or self.text_lr is None,
            "text_lr is the rate of the text encoders, which do not train; set train_text_encoders or leave it out.",
        )

    @classmethod
    def of(cls, preset_name: str | None, **given: Any) -> SubjectConfig:
        """Settings of a preset (None: of no preset) where ``given``, by the names of JSON, says nothing else."""
        defaults = {} if preset_name is None else preset(preset_name).settings("subject")
        if given.get("adapter") == "lora":
            defaults.pop("mixer", None)  # a preset's, which LoRA has no use for
        return parse(cls, {**defaults, **given})

    @property
    def phrase(self) -> str:
        """What calls the subject in a prompt, for instance "zwx robot"."""
        return f"{self.token.strip()} {self.class_name.strip()}".strip()

    @property
    def mixer_init(self) -> str:
        """How the mixer starts; empty where there is none."""
        return "" if self.adapter == "lora" else self.mixer or "orthogonal"

    def rate(self, family: str) -> float:
        """The UNet's learning rate for bases of ``family``."""
        return self.lr or LEARNING_RATES.get(family, LEARNING_RATE)

    def text_rate(self, family: str) -> float:
        """The text encoders' learning rate for bases of ``family``."""
        return self.text_lr or self.rate(family) / 2

    def pictures_at_once(self, family: str) -> int:
        """The batch for bases of ``family``."""
        return self.batch or BATCHES.get(family, BATCH)


_RANGES = {
    "rank": (1, 256), "steps": (1, 100_000), "seed": (0, 2**32 - 1), "pool": (1, 4096), "accumulate": (1, 256),
    "warmup": (0, 100_000), "prior_pictures": (0, 512), "prior_weight": (0, 10), "batch": (1, 64), "alpha": (1, 1024),
    "lr": (1e-8, 1.0), "text_lr": (1e-8, 1.0), "snr_gamma": (0.1, 100), "resolution": (8, 2048),
}  # fmt: skip
