"""Gate training (MoLE, arXiv 2404.13628): base and experts frozen, only the gates learn.

L = L_collage + α·L_balance (Eq. 16), where L_collage is the denoising error on scenes pasted from the subjects'
pictures. Every so often the error on held-out scenes is measured, and the best gates are the ones that are saved.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from mole_diffusion.bases import Base
from training.base.scenes import article, caption_of
from training.config import check, check_range
from training.data.prompts import EncodedPrompts
from training.data.subjects import Subject
from training.events import Sample
from training.objectives.collage import CollageConfig, make_pool
from training.objectives.denoise import Precision, autocast, choose_precision, draw_noise, squared_error
from training.objectives.held_out import held_out_collage_loss
from training.rng import step_generator

if TYPE_CHECKING:
    from mole_diffusion import Composition
    from mole_diffusion.gates.config import AnyGate

LEARNING_RATES, LEARNING_RATE = {"demo": 2e-3}, 1e-5  # full-size bases: as in the paper
BATCHES, BATCH = {"demo": 12}, 2
VALIDATION_STREAM = 7919  # added to the seed: held-out scenes are never training scenes


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
    """How to train gates. Unknown keys and values out of range raise InvalidRequest."""

    base: str
    """Name of the base, or a pipeline folder."""
    experts: tuple[ExpertEntry, ...] = ()
    method: Literal["learned", "static"] = "learned"
    """Gates that look at their input, or one learned weight vector per block (the baseline)."""
    scope: Literal["sample", "token"] = "sample"
    scale: Literal["softmax", "null", "sigmoid"] = "softmax"
    gain: bool = False
    objective: Literal["collage"] = "collage"
    steps: int = 300
    batch: int | None = None
    """Scenes a step; None: 12 for the demo base, the paper's 2 for full-size ones."""
    lr: float | None = None
    """Adam's learning rate; None: 2e-3 for the demo base, the paper's 1e-5 for full-size ones."""
    alpha: float = 0.5
    """Weight of L_balance (Eq. 16); 0 switches it off."""
    subject_weight: float = 1.0
    """Weight of places that show a subject beside 1 for the background."""
    prompt_dropout: float = 0.0
    """Chance of an empty prompt; needed only where unconditional rows compute their own gates."""
    seed: int = 0
    resolution: int | None = None
    """Side of the scenes in pixels; None: the base's."""
    precision: Precision | None = None
    """Of a training step; None: bfloat16 for full-size bases on a GPU, else float32. Gates stay float32."""
    pool: int = 192
    """Training scenes, encoded before the first step."""
    validation: int = 24
    """Held-out scenes; 0: no validation, the last gates are saved."""
    validate_every: int = 50
    self_views: int = 12
    """Pictures that an expert without pictures makes of its subject."""

    def __post_init__(self) -> None:
        for name, low, high in _RANGES:
            check_range(name, getattr(self, name), low, high)
        for name, low, high in (("batch", 1, 64), ("lr", 1e-8, 1.0), ("resolution", 8, 2048)):
            if getattr(self, name) is not None:
                check_range(name, getattr(self, name), low, high)
        looks = (self.scope, self.scale, self.gain) != ("sample", "softmax", False)
        check(self.method == "learned" or not looks, "Static weights have no scope, scale or gain; leave them out.")

    def gate(self, count: int) -> AnyGate:
        """What to compose ``count`` experts with."""
        from mole_diffusion.gates import GateConfig, learned_static

        if self.method == "static":
            return learned_static(count)
        return GateConfig(scope=self.scope, scale=self.scale, gain=self.gain)


_RANGES = (
    ("steps", 1, 100_000), ("alpha", 0, 100), ("subject_weight", 0.01, 100),
    ("prompt_dropout", 0, 0.9), ("seed", 0, 2**31), ("pool", 1, 4096), ("validation", 0, 1024),
    ("validate_every", 1, 100_000), ("self_views", 2, 64),
)  # fmt: skip


@dataclass
class _Best:
    loss: float
    step: int
    weights: list[Tensor]


class GateTask:
    """Trains the gates of an attached composition; see :class:`training.loop.Task`."""

    name = "gate"

    def __init__(
        self, config: GateTrainingConfig, base: Base, pipe: Any, composition: Composition, subjects: Sequence[Subject]
    ) -> None:
        """``subjects`` are in the order of the composition's experts; each needs a cut-out."""
        check(len(subjects) >= 1, "A gate needs at least one subject.")
        self.config, self.base, self.pipe, self.composition, self.subjects = config, base, pipe, composition, subjects
        self.total_steps = config.steps
        self.batch = config.batch or BATCHES.get(base.family, BATCH)
        self.device = pipe.unet.device
        self.precision: Precision = choose_precision(config.precision, base, self.device)
        self.size = config.resolution or base.resolution
        base.latent_shape(self.size, self.size)
        self.pool = make_pool(pipe, base, subjects, config.pool, config.seed, size=self.size)
        self.held_out = self._held_out() if config.validation else None
        self.prompts = self._encode()
        self.parameters = list(composition.parameters())
        check(bool(self.parameters), "These weights are fixed: there is nothing to train.")
        rate = config.lr or LEARNING_RATES.get(base.family, LEARNING_RATE)
        self.optimiser = torch.optim.Adam(self.parameters, lr=rate)
        self.start: float | None = None
        self.best: _Best | None = None
        self._scorer: Any = None

    def step(self, index: int) -> dict[str, float]:
        """One optimiser step; with a validation before the first step, after every so many, and after the last."""
        metrics: dict[str, float] = {}
        if self.start is None and self.held_out is not None:
            self.start = self._validate(index)
            metrics["start_loss"] = self.start
        metrics.update(self._train(step_generator(self.config.seed, 2, index)))
        done = index + 1
        if self.held_out is not None and (done % self.config.validate_every == 0 or done == self.total_steps):
            metrics["held_out_loss"] = self._validate(done)
        return metrics

    def enough(self) -> bool:
        """False: it trains to its last step."""
        return False

    def state_dict(self) -> dict[str, Any]:
        """Gates, optimiser, the best gates so far, and the configuration that they belong to."""
        best = None if self.best is None else asdict(self.best)
        weights = [parameter.detach() for parameter in self.parameters]
        optimiser = self.optimiser.state_dict()
        config = asdict(self.config)
        return {"config": config, "weights": weights, "optimiser": optimiser, "start": self.start, "best": best}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Inverse of :meth:`state_dict`."""
        check(state["config"] == asdict(self.config), "The checkpoint belongs to other settings; start anew.")
        self._set(state["weights"])
        self.optimiser.load_state_dict(state["optimiser"])
        self.start = state["start"]
        self.best = None if state["best"] is None else _Best(**state["best"])

    def sample(self, step: int, folder: Path) -> Iterable[Sample]:
        """One picture of all subjects together, with scores."""
        from mole_diffusion.generation import SubjectPrompt
        from training.samples import make_sample, scorer_of

        if self._scorer is None:
            self._scorer = (scorer_of(self.base, self.device),)
        phrases = [subject.phrase for subject in self.subjects]
        prompt = caption_of(phrases, "blue")
        subjects = tuple(SubjectPrompt(subject.name, article(subject.phrase)) for subject in self.subjects)
        self.composition.eval()
        yield make_sample(
            self.pipe, self.base, prompt, folder / f"{step:06d}.png", step, seed=self.config.seed, size=self.size,
            composition=self.composition, scorer=self._scorer[0], subjects=subjects,
        )  # fmt: skip

    def finish(self, out: Path) -> dict[str, Any]:
        """Save the composition with its best gates."""
        if self.best is not None:
            self._set(self.best.weights)
        self.composition.eval()
        out.parent.mkdir(parents=True, exist_ok=True)
        self.composition.recipe = self.recipe()
        self.composition.save(out)
        best = {} if self.best is None else {"held_out_loss": self.best.loss, "best_step": self.best.step}
        start = {} if self.start is None else {"start_loss": self.start}
        return {"path": str(out), "base": self.base.name, "experts": list(self.composition.names), **start, **best}

    def recipe(self) -> dict[str, Any]:
        """How the gates were trained, for the composition's file: JSON values."""
        settings = {key: value for key, value in asdict(self.config).items() if key not in ("base", "experts")}
        best = {} if self.best is None else {"held_out_loss": self.best.loss, "best_step": self.best.step}
        return {**settings, "lr": self.optimiser.param_groups[0]["lr"], "start_loss": self.start, **best}

    def _train(self, generator: torch.Generator) -> dict[str, float]:
        chosen = torch.randint(0, len(self.pool), (self.batch,), generator=generator)
        latents = self.pool.latents[chosen.to(self.device)]
        steps = self.pipe.scheduler.config.num_train_timesteps
        noise, t = draw_noise(latents.shape, steps, generator, self.device)
        dropped = torch.rand(len(chosen), generator=generator) < self.config.prompt_dropout
        texts = ["" if drop else self.pool.prompts[row] for row, drop in zip(chosen.tolist(), dropped, strict=True)]
        present = self.pool.masks[chosen.to(self.device)].sum(1).clamp(0, 1)
        self.composition.train()
        self.composition.condition(texts, guidance=False)
        self.optimiser.zero_grad(set_to_none=True)
        with autocast(self.device, self.precision):
            errors = squared_error(self.pipe, self.base, latents, noise, t, self.prompts.rows(texts))
        denoising = self._weighted(errors, present)
        balance = self.composition.balance_loss(token_mask=present)
        loss = denoising + self.config.alpha * balance
        loss.backward()
        self.optimiser.step()
        return {"loss": loss.item(), "denoising": denoising.item(), "balance": balance.item()}

    def _weighted(self, errors: Tensor, present: Tensor) -> Tensor:
        weights = (1 + (self.config.subject_weight - 1) * present).unsqueeze(1)
        return (errors * weights).mean() / weights.mean()

    def _validate(self, step: int) -> float:
        assert self.held_out is not None
        errors = held_out_collage_loss(
            self.composition, self.pipe, self.base, self.held_out, draws=2, prompts=self.prompts,
            precision=self.precision,
        )  # fmt: skip
        loss = float(errors.mean())
        if self.best is None or loss < self.best.loss:
            self.best = _Best(loss, step, [parameter.detach().clone() for parameter in self.parameters])
        return loss

    def _held_out(self) -> Any:
        config = self.config
        seed = config.seed + VALIDATION_STREAM
        return make_pool(
            self.pipe, self.base, self.subjects, config.validation, seed, size=self.size,
            config=CollageConfig.of(self.base, single=0),
        )  # fmt: skip

    def _encode(self) -> EncodedPrompts:
        texts = [*self.pool.prompts, *(self.held_out.prompts if self.held_out else ())]
        empty = [""] if self.config.prompt_dropout else []
        self.composition.eval()
        return EncodedPrompts(self.base, self.pipe, [*texts, *empty], self.size)

    def _set(self, weights: Sequence[Tensor]) -> None:
        with torch.no_grad():
            for parameter, value in zip(self.parameters, weights, strict=True):
                parameter.copy_(value)
