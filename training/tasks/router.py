"""Router training (RouterLoRA, arXiv 2406.16989): base and experts frozen, one router learns to weigh any experts.

Every step holds a group out of the pool and denoises scenes pasted from the group's pictures; each row has its scene's
experts and some that the scene does not name, dropped at random, so that the router neither counts experts nor knows
them. Pairs of held-out experts tell how well it takes experts that it never saw; the best router is the one saved.
There is no balance loss: an expert that a scene does not name should get nothing, which L_balance (arXiv 2404.13628,
Eq. 14) would punish.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from math import ceil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from mole_diffusion.bases import Base
from training.base.scenes import article, caption_of
from training.config import check
from training.data.prompts import EncodedPrompts
from training.data.subjects import Subject
from training.events import Sample
from training.objectives.denoise import Precision, autocast, choose_precision, draw_noise, squared_error
from training.objectives.held_out import held_out_collage_loss
from training.ranks import ALONE, Ranks
from training.rng import step_generator
from training.tasks.router_config import RouterTrainingConfig
from training.tasks.router_scenes import EACH, Group, draw_groups, draw_present, make_group

if TYPE_CHECKING:
    from mole_diffusion import Expert
    from mole_diffusion.gates.config import AnyGate

LEARNING_RATES, LEARNING_RATE = {"demo": 2e-3}, 1e-4
BATCHES, BATCH = {"demo": 12}, 2
VALIDATION_STREAM = 7919  # added to the seed: held-out scenes are never training scenes


@dataclass
class _Best:
    loss: float
    step: int
    weights: dict[str, Tensor]


class RouterTask:
    """Trains a router over a pool of experts; see :class:`training.loop.Task`.

    Attributes:
        router: what learns: routers of all modules that any expert of the pool touches.
        composition: holds the experts of the step at hand, weighed by that router.
        held: numbers of the experts that no step uses.
        start: validation loss of NLA, which is the untrained router, and of trigger spans.
    """

    name = "router"

    def __init__(
        self, config: RouterTrainingConfig, base: Base, pipe: Any, experts: Sequence[Expert],
        subjects: Sequence[Subject], ranks: Ranks = ALONE,
    ) -> None:  # fmt: skip
        """``subjects`` are in the order of the experts, whose names and triggers differ; each needs a cut-out."""
        from mole_diffusion import compose

        self.config, self.base, self.pipe, self.ranks = config, base, pipe, ranks
        self.experts, self.subjects = tuple(experts), tuple(subjects)
        self.total_steps = config.steps
        self.batch = config.batch or BATCHES.get(base.family, BATCH)
        self.device = pipe.unet.device
        self.precision: Precision = choose_precision(config.precision, base, self.device)
        self.size = config.resolution or base.resolution
        base.latent_shape(self.size, self.size)
        ranks.part(self.batch)
        order = torch.randperm(len(experts), generator=step_generator(config.seed, 5, 0)).tolist()
        held = config.split(len(experts))
        self.held, self.trained = order[:held], order[held:]
        self.router = self._new_router()
        self.groups, self.pairs = self._groups(), self._pairs()
        first = [self.experts[number] for number in self.groups[0].experts]
        self.composition = compose(pipe, first, gate=config.gate(), base=base).attach()
        self.prompts = self._encode()
        self.parameters = list(self.router.parameters())
        rate = config.lr or LEARNING_RATES.get(base.family, LEARNING_RATE)
        self.optimiser = torch.optim.Adam(self.parameters, lr=rate)
        self.start: dict[str, float] | None = None
        self.best: _Best | None = None
        self._scorer: Any = None

    def step(self, index: int) -> dict[str, float]:
        """One optimiser step; with a validation before the first step, after every so many, and after the last."""
        metrics: dict[str, float] = {}
        if self.start is None and self.pairs:
            self.start = self._baselines(index)
            metrics.update(self.start)
        metrics.update(self._train(step_generator(self.config.seed, 6, index)))
        done = index + 1
        if self.pairs and (done % self.config.validate_every == 0 or done == self.total_steps):
            metrics["held_out_loss"] = self._validate(done)
        return metrics

    def enough(self) -> bool:
        """False: it trains to its last step."""
        return False

    def state_dict(self) -> dict[str, Any]:
        """Router, optimiser, the best router so far, and the configuration that they belong to."""
        best = None if self.best is None else asdict(self.best)
        optimiser = self.optimiser.state_dict()
        return {
            "config": asdict(self.config), "experts": [expert.sha256 for expert in self.experts],
            "weights": self._weights(), "optimiser": optimiser, "start": self.start, "best": best,
        }  # fmt: skip

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Inverse of :meth:`state_dict`."""
        check(state["config"] == asdict(self.config), "The checkpoint belongs to other settings; start anew.")
        members = [expert.sha256 for expert in self.experts]
        check(state["experts"] == members, "The checkpoint belongs to other experts; start anew.")
        self.router.load_state_dict(state["weights"])
        self.optimiser.load_state_dict(state["optimiser"])
        self.start = state["start"]
        self.best = None if state["best"] is None else _Best(**state["best"])

    def sample(self, step: int, folder: Path) -> Iterable[Sample]:
        """One picture of a pair that no step uses (of the first group, where none is held out), with scores."""
        from mole_diffusion.generation import SubjectPrompt
        from training.samples import make_sample, scorer_of

        if self._scorer is None:
            self._scorer = (scorer_of(self.base, self.device),)
        numbers = (self.pairs or self.groups)[0].experts[:2]
        pair = [self.subjects[number] for number in numbers]
        self._put(numbers)
        prompt = caption_of([subject.phrase for subject in pair], "blue")
        subjects = tuple(SubjectPrompt(subject.name, article(subject.phrase)) for subject in pair)
        yield make_sample(
            self.pipe, self.base, prompt, folder / f"{step:06d}.png", step, seed=self.config.seed, size=self.size,
            composition=self.composition, scorer=self._scorer[0], subjects=subjects,
            views={subject.name: subject.views for subject in pair},
        )  # fmt: skip

    def finish(self, out: Path) -> dict[str, Any]:
        """Save the best router, which fits any experts of this base."""
        from mole_diffusion.gates.router_file import save_router

        if self.best is not None:
            self.router.load_state_dict(self.best.weights)
        save_router(self.router, out, self.base, self.recipe())
        return {"path": str(out), "base": self.base.name, "experts": len(self.experts), **self._figures()}

    def recipe(self) -> dict[str, Any]:
        """How the router was trained, for its file: JSON values."""
        settings = {key: value for key, value in asdict(self.config).items() if key not in ("base", "experts")}
        rate = self.optimiser.param_groups[0]["lr"]
        return {**settings, "lr": rate, "experts": len(self.experts), **self._figures()}

    def _figures(self) -> dict[str, float]:
        best = {} if self.best is None else {"held_out_loss": self.best.loss, "best_step": self.best.step}
        return {**(self.start or {}), **best}

    def _train(self, generator: torch.Generator) -> dict[str, float]:
        number = int(torch.randint(0, len(self.groups), (), generator=generator))
        group, rows = self.groups[number], self.ranks.part(self.batch)
        chosen = torch.randint(0, len(group.scenes), (self.batch,), generator=generator)
        latents = group.scenes.latents[chosen.to(self.device)]
        timesteps = self.pipe.scheduler.config.num_train_timesteps
        noise, t = draw_noise(latents.shape, timesteps, generator, self.device)
        present = draw_present(group.named[chosen], self.config.dropout, self.config.distractors, generator)
        texts = [group.scenes.prompts[row] for row in chosen.tolist()]
        names = self._put(group.experts)
        subsets = [[name for name, here in zip(names, row, strict=True) if here] for row in present.tolist()]
        self.composition.train()
        self.composition.condition(texts[rows], guidance=False, subsets=subsets[rows])
        self.optimiser.zero_grad(set_to_none=True)
        with autocast(self.device, self.precision):
            conditioning = self.prompts[number].rows(texts[rows])
            errors = squared_error(self.pipe, self.base, latents[rows], noise[rows], t[rows], conditioning)
        loss = (errors * self._weigh(group.scenes.masks[chosen.to(self.device)])[rows]).mean()
        loss.backward()
        self.ranks.average(self.parameters)
        self.optimiser.step()
        return {"loss": self.ranks.mean(loss.item()), "present": float(present.sum(1).float().mean())}

    def _weigh(self, masks: Tensor) -> Tensor:
        """(B, 1, h, w) weights of places, of mean 1 over the batch, from the subjects' masks (B, E, h, w)."""
        weights = 1 + (self.config.subject_weight - 1) * masks.sum(1, keepdim=True).clamp(0, 1)
        return weights / weights.mean()

    def _put(self, numbers: Sequence[int], gate: AnyGate | None = None) -> tuple[str, ...]:
        """Let the composition hold these experts, weighed by the router or by another gate; gives their names."""
        from mole_diffusion.gates import RouterGates

        self.composition.switch([self.experts[number] for number in numbers], gate=gate or self.config.gate())
        if isinstance(self.composition.gate, RouterGates):
            self.composition.gate.borrow(self.router)
        return self.composition.names

    def _baselines(self, step: int) -> dict[str, float]:
        from mole_diffusion import TriggerSpans
        from mole_diffusion.gates import nla

        found = {"nla_loss": self._loss(nla(2)), "spans_loss": self._loss(TriggerSpans())}
        self._validate(step)
        return found

    def _validate(self, step: int) -> float:
        loss = self._loss(None)
        if self.best is None or loss < self.best.loss:
            self.best = _Best(loss, step, self._weights())
        return loss

    def _loss(self, gate: AnyGate | None) -> float:
        """Mean error on the scenes of held-out pairs, the same noise for every gate."""
        errors = []
        for pair in self.pairs:
            self._put(pair.experts, gate)
            errors.append(
                held_out_collage_loss(
                    self.composition, self.pipe, self.base, pair.scenes, draws=2, precision=self.precision,
                    batch=self.batch if self.base.full_size else 8,
                )
            )
        return float(np.concatenate(errors).mean())

    def _weights(self) -> dict[str, Tensor]:
        return {name: value.detach().clone() for name, value in self.router.state_dict().items()}

    def _new_router(self) -> Any:
        from mole_diffusion.gates import RouterGates
        from mole_diffusion.hosts import host_for
        from mole_diffusion.plan import build_plan

        sizes = build_plan(host_for(self.pipe), self.experts, "matrix").sizes
        with torch.random.fork_rng():
            torch.manual_seed(self.config.seed)  # A_r starts at random
            return RouterGates(sizes, self.config.gate()).to(self.device)

    def _groups(self) -> list[Group]:
        """The pool's scenes: groups of experts, drawn at random, with a dozen scenes each."""
        config = self.config
        counts = [min(EACH, config.pool - at) for at in range(0, config.pool, EACH)]
        drawn = draw_groups(self.trained, len(counts), config.group, config.seed)
        return [
            make_group(self.pipe, self.base, self.subjects, numbers, count, config.seed + turn, size=self.size)
            for turn, (numbers, count) in enumerate(zip(drawn, counts, strict=True))
        ]

    def _pairs(self) -> list[Group]:
        """Scenes of disjoint pairs of held-out experts."""
        pairs = [tuple(self.held[at : at + 2]) for at in range(0, len(self.held) - 1, 2)]
        each, seed = ceil(self.config.validation / max(len(pairs), 1)), self.config.seed + VALIDATION_STREAM
        return [
            make_group(self.pipe, self.base, self.subjects, pair, each, seed, size=self.size, chances=(0, 1))
            for pair in pairs
        ]

    def _encode(self) -> list[EncodedPrompts]:
        """The prompts of every group, by text encoders with that group's experts."""
        tables = []
        self.composition.eval()
        for group in self.groups:
            self._put(group.experts)
            tables.append(EncodedPrompts(self.base, self.pipe, group.scenes.prompts, self.size))
        return tables
