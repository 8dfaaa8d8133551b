"""Gate training (MoLE, arXiv 2404.13628): base and experts frozen, only the gates learn.

L = L_D + α·L_balance (Eq. 16). L_D is the denoising error on scenes pasted from the subjects' pictures, or what an
image-text model says of x̂0 in such scenes, or both. Every so often the gates are validated, by the score of a few
pictures and by the error on held-out scenes, and the best gates are the ones that are saved.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mole_diffusion.bases import Base
from training.base.scenes import article, caption_of
from training.best import Best
from training.config import check
from training.data.prompts import EncodedPrompts
from training.data.subjects import Subject
from training.events import Sample
from training.objectives.clip import ClipObjective
from training.objectives.collage import CollageConfig, ScenePool, make_pool
from training.objectives.denoise import Precision, ask, autocast, choose_precision, draw_noise
from training.objectives.gate_stats import gate_stats
from training.objectives.held_out import held_out_collage_loss
from training.objectives.picture_score import PictureScore
from training.ranks import Ranks
from training.rng import step_generator
from training.tasks.gate_config import PATIENCE, ExpertEntry, GateTrainingConfig
from training.validation import Scorers
from training.words import class_words

if TYPE_CHECKING:
    from mole_diffusion import Composition
    from mole_diffusion.trace import Trace

__all__ = ["ExpertEntry", "GateTask", "GateTrainingConfig"]

LEARNING_RATES, LEARNING_RATE = {"demo": 2e-3}, 1e-5  # full-size bases: as in the paper
BATCHES, BATCH = {"demo": 12}, 2
ALONE, NOBODY = Ranks(), Scorers()
VALIDATION_STREAM = 7919  # added to the seed: held-out scenes are never training scenes


class GateTask:
    """Trains the gates of an attached composition; see :class:`training.loop.Task`.

    With several processes every one of them validates, and their mean counts. L_balance is that of each process's own
    rows: the mean of these is a little above that of the whole batch.
    """

    name = "gate"

    def __init__(
        self, config: GateTrainingConfig, base: Base, pipe: Any, composition: Composition, subjects: Sequence[Subject],
        scorers: Scorers = NOBODY, ranks: Ranks = ALONE,
    ) -> None:  # fmt: skip
        """``subjects`` are in the order of the composition's experts; each needs a cut-out."""
        check(len(subjects) >= 1, "A gate needs at least one subject.")
        self.config, self.base, self.pipe, self.composition, self.subjects = config, base, pipe, composition, subjects
        self.scorers, self.ranks = scorers, ranks
        self.total_steps = config.steps
        self.batch = config.batch or BATCHES.get(base.family, BATCH)
        self.rows = ranks.part(self.batch)
        self.device = pipe.unet.device
        self.precision: Precision = choose_precision(config.precision, base, self.device)
        self.size = config.resolution or base.resolution
        base.latent_shape(self.size, self.size)
        self.words = class_words(config.experts, composition.experts, subjects)
        self.pool = make_pool(pipe, base, subjects, config.pool, config.seed, size=self.size)
        self.held_out = self._held_out() if config.validation else None
        self.prompts = self._encode()
        self.clip = self._clip()
        self.pictures = self._pictures()
        self.parameters = list(composition.parameters())
        check(bool(self.parameters), "These weights are fixed: there is nothing to train.")
        rate = config.lr or LEARNING_RATES.get(base.family, LEARNING_RATE)
        self.optimiser = torch.optim.Adam(self.parameters, lr=rate)
        self.start: dict[str, float] = {}
        usual = 0 if self.pictures is None else PATIENCE
        self.best = Best(usual if config.patience is None else config.patience)
        self._notes = dict(composition.recipe)
        self._sample_scorer: Any = None
        self.keep: Callable[[Path], object] = lambda path: None
        """Is handed the finished file, for instance to keep it for the next job with this set."""

    @property
    def stops_on(self) -> str:
        """What says which gates are best: "score", "loss", or "nothing"."""
        return "score" if self.pictures is not None else "loss" if self.held_out is not None else "nothing"

    def step(self, index: int) -> dict[str, float]:
        """One optimiser step; with a validation before the first step, after every so many, and after the last."""
        metrics: dict[str, float] = {}
        validates = self.stops_on != "nothing"
        if validates and not self.start:
            found = self._validate(index)
            self.start = {f"start_{name.removeprefix('held_out_')}": value for name, value in found.items()}
            metrics.update(self.start)
        metrics.update(self._train(step_generator(self.config.seed, 2, index)))
        done = index + 1
        due = done % self.config.validate_every == 0 or done == self.total_steps
        if validates and due and math.isfinite(metrics["loss"]):
            metrics.update(self._validate(done))
        return metrics

    def enough(self) -> bool:
        """Whether so many validations in a row brought nothing better that none is waited for."""
        return self.best.enough

    def state_dict(self) -> dict[str, Any]:
        """Gates, optimiser, the best gates so far, and the configuration that they belong to."""
        weights = [parameter.detach() for parameter in self.parameters]
        return {
            "config": asdict(self.config), "experts": self._members(), "weights": weights,
            "optimiser": self.optimiser.state_dict(),
            "start": self.start, "best": self.best.state_dict(), "stops_on": self.stops_on,
        }  # fmt: skip

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Inverse of :meth:`state_dict`."""
        check(state["experts"] == self._members(), "The checkpoint belongs to other experts; start anew.")
        same = state["config"] == asdict(self.config) and state["stops_on"] == self.stops_on
        check(same, "The checkpoint belongs to other settings, or other models judged it; start anew.")
        self._set(state["weights"])
        self.optimiser.load_state_dict(state["optimiser"])
        self.start = dict(state["start"])
        self.best.load_state_dict(state["best"])

    def sample(self, step: int, folder: Path) -> Iterable[Sample]:
        """One picture of all subjects together, with scores by models that did not train the gates."""
        from mole_diffusion.generation import SubjectPrompt
        from training.samples import make_sample, scorer_of

        if self._sample_scorer is None:
            fair = self.scorers.may_report(self.base.alignment_model)
            self._sample_scorer = (scorer_of(self.base, self.device) if fair else None,)
        prompt = caption_of([subject.phrase for subject in self.subjects], "blue")
        subjects = tuple(SubjectPrompt(subject.name, article(subject.phrase)) for subject in self.subjects)
        yield make_sample(
            self.pipe, self.base, prompt, folder / f"{step:06d}.png", step, seed=self.config.seed, size=self.size,
            composition=self.composition, scorer=self._sample_scorer[0], subjects=subjects,
            views={subject.name: subject.cutouts for subject in self.subjects},
        )  # fmt: skip

    def finish(self, out: Path) -> dict[str, Any]:
        """Save the composition with its best gates."""
        if self.best.weights:
            self._set(self.best.weights)
        self.composition.eval()
        out.parent.mkdir(parents=True, exist_ok=True)
        self.composition.recipe = self.recipe()
        self.composition.save(out)
        self.keep(out)
        named = {"path": str(out), "base": self.base.name, "experts": list(self.composition.names)}
        return {**named, **self.start, **self._reached()}

    def recipe(self) -> dict[str, Any]:
        """How the gates were trained, for the composition's file: JSON values."""
        settings = {key: value for key, value in asdict(self.config).items() if key not in ("base", "experts")}
        rate = self.optimiser.param_groups[0]["lr"]
        judged = {"stops_on": self.stops_on, "scorers": self.scorers.labels}
        return {**self._notes, **settings, "lr": rate, **judged, **self.start, **self._reached()}

    def _members(self) -> list[str]:
        return [expert.sha256 for expert in self.composition.experts]

    def _reached(self) -> dict[str, Any]:
        return {**self.best.metrics, "best_step": self.best.step} if self.best.weights else {}

    def _train(self, generator: torch.Generator) -> dict[str, float]:
        """Draws the whole batch, works on this process's rows."""
        chosen = torch.randint(0, len(self.pool), (self.batch,), generator=generator)
        shape = torch.Size((self.batch, *self.pool.latents.shape[1:]))
        first, last = self._timesteps()
        noise, t = draw_noise(shape, last - first, generator, self.device)
        t = t + first
        dropped = torch.rand(self.batch, generator=generator) < self.config.prompt_dropout
        present = self.pool.masks[chosen.to(self.device)].sum(1).clamp(0, 1)
        weights = (1 + (self.config.subject_weight - 1) * present).unsqueeze(1)
        whole = weights.mean()
        drawn = (chosen, noise, t, dropped, present, weights)
        chosen, noise, t, dropped, present, weights = (item[self.rows] for item in drawn)
        scenes = [self.pool.prompts[row] for row in chosen.tolist()]
        texts = ["" if drop else text for text, drop in zip(scenes, dropped.tolist(), strict=True)]
        latents = self.pool.latents[chosen.to(self.device)]
        self.composition.train()
        self.composition.condition(texts, guidance=False)
        self.optimiser.zero_grad(set_to_none=True)
        with autocast(self.device, self.precision):
            answer = ask(self.pipe, self.base, latents, noise, t, self.prompts.rows(texts))
        metrics, loss = {}, latents.new_zeros(())
        if self.config.objective != "clip":
            target = self.base.denoise_target(self.pipe.scheduler, latents, noise, t).float()
            loss = metrics["denoising"] = ((answer - target).square() * weights).mean() / whole
        if self.clip is not None:
            metrics["clip"] = self._please(latents, noise, t, answer, chosen, dropped)
            loss = loss + (1 if self.config.objective == "clip" else self.config.clip_weight) * metrics["clip"]
        if self.config.balance != "none":
            kind = "entropy" if self.config.balance == "entropy" else "product"
            metrics["balance"] = self.composition.balance_loss(token_mask=present, kind=kind)
            loss = loss + self.config.alpha * metrics["balance"]
        loss.backward()
        self.ranks.average(self.parameters)
        self.optimiser.step()
        return {name: self.ranks.mean(value.item()) for name, value in {"loss": loss, **metrics}.items()}

    def _timesteps(self) -> tuple[int, int]:
        """First timestep that a step draws, and the one after the last."""
        return self._seen() if self.config.objective == "clip" else (0, self._schedule)

    def _seen(self) -> tuple[int, int]:
        """The first timestep that L_clip sees, and the one after the last; one at least."""
        first = min(int(self.config.clip_from * self._schedule), self._schedule - 1)
        return first, max(round(self.config.clip_until * self._schedule), first + 1)

    @property
    def _schedule(self) -> int:
        return self.pipe.scheduler.config.num_train_timesteps

    def _please(
        self, latents: Tensor, noise: Tensor, t: Tensor, answer: Tensor, chosen: Tensor, dropped: Tensor
    ) -> Tensor:
        """Mean L_clip over this process's rows; those with no prompt or outside the range of timesteps count 0."""
        assert self.clip is not None
        first, last = self._seen()
        inside = (t >= first) & (t < last)
        seen = torch.nonzero(inside.cpu() & ~dropped).flatten()
        if not len(seen):
            return answer.sum() * 0
        rows = seen.to(self.device)
        noisy = self.pipe.scheduler.add_noise(latents[rows], noise[rows], t[rows])
        clean = self.base.x0_from(self.pipe.scheduler, answer[rows], noisy.float(), t[rows])
        prompts = [self.pool.prompts[row] for row in chosen[seen].tolist()]
        return self.clip(clean, self.pool.masks[chosen[seen].to(self.device)], prompts).sum() / len(chosen)

    def _validate(self, step: int) -> dict[str, float]:
        """What the held-out scenes and the pictures say, and how the gates share; the best gates are kept."""
        metrics: dict[str, float] = {}
        traces: list[Trace] = []
        if self.held_out is not None:
            errors = held_out_collage_loss(
                self.composition, self.pipe, self.base, self.held_out, draws=2, prompts=self.prompts,
                batch=self.batch if self.base.full_size else 8,
                precision=self.precision, traces=traces,
            )  # fmt: skip
            metrics["held_out_loss"] = self.ranks.mean(float(errors.mean()))
        if self.pictures is not None:
            found = self.pictures.measure(self.composition, None if traces else traces)
            metrics.update({name: self.ranks.mean(value) for name, value in found.items()})
        metrics.update(gate_stats(traces))
        value = metrics["score"] if self.pictures is not None else -metrics["held_out_loss"]
        self.best.offer(value, step, self.parameters, metrics)
        return metrics

    def _held_out(self) -> ScenePool:
        config = self.config
        seed = config.seed + VALIDATION_STREAM
        return make_pool(
            self.pipe, self.base, self.subjects, config.validation, seed, size=self.size,
            config=CollageConfig.of(self.base, single=0),
        )  # fmt: skip

    def _clip(self) -> ClipObjective | None:
        if self.config.objective == "collage":
            return None
        check(self.scorers.trains is not None, "The CLIP objective needs an image-text model that trains.")
        assert self.scorers.trains is not None
        return ClipObjective(
            self.scorers.trains, self.base, self.pipe, self.subjects, self.words, self.config.clip_terms,
            side=self.config.clip_side,
        )  # fmt: skip

    def _pictures(self) -> PictureScore | None:
        """Scores validations, where that was asked for and a model that did not train is here."""
        config = self.config
        if config.stop_on == "loss" or not config.validate_prompts or self.scorers.knows is None:
            check(config.stop_on != "score", "Stopping on the score needs a model that judges without having trained.")
            return None
        return PictureScore(
            self.scorers, self.base, self.pipe, self.subjects, self.words, count=config.validate_prompts,
            steps=config.validate_picture_steps, size=self.size, seed=config.seed + VALIDATION_STREAM,
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
