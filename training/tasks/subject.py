"""DreamBooth with LoRA (arXiv 2208.12242, 2106.09685): a few pictures of a subject become an expert."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mole_diffusion.bases import Base
from mole_diffusion.errors import InvalidRequest
from training.base.scenes import article, background_phrase
from training.config import check
from training.data.prompts import EncodedPrompts, LivePrompts
from training.data.subjects import Subject
from training.data.views import ViewPool, class_pool, view_pool
from training.errors import memory_named
from training.events import Sample
from training.objectives.denoise import (
    Precision,
    autocast,
    choose_precision,
    draw_noise,
    min_snr_weights,
    squared_error,
)
from training.optimisers import make_optimiser, rate_factor, set_rates
from training.presets import advice
from training.ranks import ALONE, Ranks
from training.rng import step_generator
from training.tasks.subject_adapter import adapter_modules, attach_adapter, detach_adapter
from training.tasks.subject_config import SubjectConfig

if TYPE_CHECKING:
    from mole_diffusion.scoring import AlignmentScorer

__all__ = ["SubjectConfig", "SubjectTask"]
SAMPLE_BACKGROUNDS = ("blue", "beach")


class SubjectTask:
    """Trains a LoRA or MoSLoRA through PEFT; see :class:`training.loop.Task`."""

    name = "subject"

    def __init__(
        self, config: SubjectConfig, base: Base, pipe: Any, subject: Subject, ranks: Ranks = ALONE,
        work: Path | None = None,
    ) -> None:  # fmt: skip
        """Encode the pictures and prompts and attach a fresh adapter; :meth:`close` takes it off again.

        ``work`` is a folder for pictures of the class, which need not be made again after an interruption.
        """
        if not subject.views:
            raise InvalidRequest(f"{subject.name} has no picture to learn from; give at least one.")
        self.config, self.base, self.pipe, self.subject, self.ranks = config, base, pipe, subject, ranks
        self.total_steps = config.steps
        self.batch = config.pictures_at_once(base.family)
        ranks.part(self.batch)
        self.device = pipe.unet.device
        self.precision: Precision = choose_precision(config.precision, base, self.device)
        self.size = config.resolution or base.resolution
        base.latent_shape(self.size, self.size)
        self._scorer: AlignmentScorer | None = None
        with self._memory_named():
            self.pool = view_pool(pipe, base, subject, self.size, config.pool, config.seed, flip=config.flip)
            self.prior = self._prior(work)
            captions = [*self.pool.captions, *(self.prior.captions if self.prior else ())]
            kind = LivePrompts if config.train_text_encoders else EncodedPrompts
            self.prompts = kind(base, pipe, captions, self.size)
            self.parameters = attach_adapter(pipe, base, config)
            self.optimiser = make_optimiser(config.optimiser, self._groups(), self.device)
        self.rates = [group["lr"] for group in self.optimiser.param_groups]
        self._move_idle("cpu")

    def step(self, index: int) -> dict[str, float]:
        """One optimiser step on subject pictures, and as many of the class with prior preservation."""
        config, generator = self.config, step_generator(self.config.seed, 1, index)
        factor = rate_factor(config.schedule, index, self.total_steps, config.warmup)
        set_rates(self.optimiser, self.rates, factor)
        self.pipe.unet.train()
        self.optimiser.zero_grad(set_to_none=True)
        totals: dict[str, float] = {}
        with self._memory_named():
            for _ in range(config.accumulate):
                for name, value in self._add_gradients(generator).items():
                    totals[name] = totals.get(name, 0.0) + value / config.accumulate
            self.ranks.average(self.parameters.values())
            norm = torch.nn.utils.clip_grad_norm_(list(self.parameters.values()), 1.0)
            self.optimiser.step()
        metrics = {name: self.ranks.mean(value) for name, value in totals.items()}
        varies = config.warmup > 0 or config.schedule != "constant"
        return {**metrics, "grad_norm": norm.item(), **({"lr": self.rates[0] * factor} if varies else {})}

    def enough(self) -> bool:
        """False: it trains to its last step."""
        return False

    def state_dict(self) -> dict[str, Any]:
        """Adapter, optimiser, and the configuration that they belong to."""
        weights = {name: parameter.detach() for name, parameter in self.parameters.items()}
        return {"config": asdict(self.config), "weights": weights, "optimiser": self.optimiser.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Inverse of :meth:`state_dict`."""
        check(state["config"] == asdict(self.config), "The checkpoint belongs to other settings; start a new run.")
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                parameter.copy_(state["weights"][name])
        self.optimiser.load_state_dict(state["optimiser"])

    def sample(self, step: int, folder: Path) -> Iterable[Sample]:
        """The subject on two backgrounds, at the weight at which it is used, with alignment and identity."""
        from training.samples import make_samples, scorer_of

        self._scorer = self._scorer or scorer_of(self.base, self.device)
        prompts = [f"{article(self.config.phrase)} {background_phrase(name)}" for name in SAMPLE_BACKGROUNDS]
        self._move_idle(self.device)
        try:
            yield from make_samples(
                self.pipe, self.base, prompts, folder, step, seed=self.config.seed, size=self.size,
                scorer=self._scorer, views={self.subject.name: self.subject.views},
            )  # fmt: skip
        finally:
            self._move_idle("cpu")

    def finish(self, out: Path) -> dict[str, Any]:
        """Save the expert as a safetensors file that diffusers and this project read; mixers are folded in."""
        from mole_diffusion.experts import save_expert

        config = self.config
        mixer = {"mole.mixer": config.mixer_init} if config.mixer_init else {}
        metadata = {
            "modelspec.trigger_phrase": config.phrase,
            "modelspec.title": config.name or out.stem,
            "mole.base": self.base.family,
            "mole.class": config.class_name,
            "mole.adapter": config.adapter,
            **mixer,
            "mole.rank": str(config.rank),
            "mole.steps": str(config.steps),
            "mole.seed": str(config.seed),
        }
        out.parent.mkdir(parents=True, exist_ok=True)
        modules = adapter_modules(self.pipe, self.base, config)
        save_expert(modules, out, format="diffusers", metadata=metadata)
        return {
            "path": str(out), "trigger": config.phrase, "base": self.base.family, "rank": config.rank,
            "adapter": config.adapter,
        }  # fmt: skip

    def close(self) -> None:
        """Take the adapter off: the pipeline is the base's again."""
        self._move_idle(self.device)
        detach_adapter(self.pipe, self.base, self.config)

    def _groups(self) -> list[dict[str, Any]]:
        """Parameters with their rates: the UNet's, then those of the text encoders if they learn."""
        unet = [value for name, value in self.parameters.items() if name.startswith("unet.")]
        text = [value for name, value in self.parameters.items() if not name.startswith("unet.")]
        groups = [{"params": unet, "lr": self.config.rate(self.base.family)}]
        return [*groups, {"params": text, "lr": self.config.text_rate(self.base.family)}] if text else groups

    def _prior(self, work: Path | None) -> ViewPool | None:
        config = self.config
        if not config.prior_pictures or not config.prior_weight:
            return None
        check(bool(config.class_name.strip()), "Prior preservation needs the subject's class.")
        return class_pool(
            self.pipe, self.base, config.class_name, self.size, config.prior_pictures, config.seed,
            together=self.batch, folder=work,
        )  # fmt: skip

    def _move_idle(self, device: torch.device | str) -> None:
        """With ``offload``: what no step needs goes to ``device``."""
        if not self.config.offload:
            return
        learning = self.base.components if self.config.train_text_encoders else ("unet",)
        for name, part in self.pipe.components.items():
            if isinstance(part, torch.nn.Module) and name not in learning:
                part.to(device)
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def _memory_named(self) -> AbstractContextManager[None]:
        """Says in a sentence what to change where memory is used up."""
        cuda = self.device.type == "cuda"
        total = torch.cuda.get_device_properties(self.device).total_memory / 2**30 if cuda else None
        return memory_named(advice(self.batch, self.size, total))

    def _add_gradients(self, generator: torch.Generator) -> dict[str, float]:
        """Gradients of one batch, added to what is there; its losses."""
        loss = self._loss(self.pool, generator)
        losses = {}
        if self.prior is not None:
            prior = self._loss(self.prior, generator)
            losses["prior_loss"] = prior.item()
            loss = loss + self.config.prior_weight * prior
        (loss / self.config.accumulate).backward()
        return {"loss": loss.item(), **losses}

    def _loss(self, pool: ViewPool, generator: torch.Generator) -> Tensor:
        """The mean error of this process's rows of a batch that all processes draw alike."""
        rows = self.ranks.part(self.batch)
        chosen = torch.randint(0, len(pool.captions), (self.batch,), generator=generator)
        steps = self.pipe.scheduler.config.num_train_timesteps
        shape = torch.Size((self.batch, *pool.latents.shape[1:]))
        noise, t = draw_noise(shape, steps, generator, self.device)
        chosen, noise, t = chosen[rows], noise[rows], t[rows]
        latents = pool.latents[chosen.to(pool.latents.device)]
        with autocast(self.device, self.precision):
            conditioning = self.prompts.rows([pool.captions[number] for number in chosen.tolist()])
            errors = squared_error(self.pipe, self.base, latents, noise, t, conditioning)
        if pool.weights is not None:
            errors = errors * pool.weights[chosen.to(pool.weights.device)]
        errors = errors.mean((1, 2, 3))
        if self.config.snr_gamma is not None:
            errors = errors * min_snr_weights(self.pipe, self.base, t, self.config.snr_gamma)
        return errors.mean()
