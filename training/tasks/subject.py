"""DreamBooth with LoRA (arXiv 2208.12242, 2106.09685): a few pictures of a subject become an expert."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from mole_diffusion.bases import Base
from mole_diffusion.errors import InvalidRequest
from training.base.scenes import article
from training.config import check, check_range
from training.data.prompts import EncodedPrompts
from training.data.subjects import Subject
from training.data.views import ViewPool, class_pool, view_pool
from training.events import Sample
from training.objectives.denoise import (
    Precision,
    autocast,
    choose_precision,
    draw_noise,
    min_snr_weights,
    squared_error,
)
from training.rng import step_generator

ADAPTER = "subject"
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
    adapter: Literal["lora"] = "lora"
    rank: int = 16
    alpha: int | None = None
    """LoRA's α; None: the rank, so that the scale is 1."""
    steps: int = 400
    batch: int | None = None
    """Pictures a step; None: 8 for the demo base, 4 for full-size ones."""
    lr: float | None = None
    """Learning rate; None: 1e-3 for the demo base, 1e-4 for full-size ones."""
    seed: int = 0
    resolution: int | None = None
    """Side of the training pictures in pixels; None: the base's."""
    precision: Precision | None = None
    """Of a training step; None: bfloat16 for full-size bases on a GPU, else float32. Weights train in float32."""
    snr_gamma: float | None = None
    """γ of min-SNR weighting (arXiv 2303.09556); None: plain mean."""
    flip: bool | None = None
    """Mirror half of the pictures; off for a subject with a left and a right. None: on, but off for the demo base."""
    pool: int = 256
    """Different augmented pictures that are encoded before the first step."""
    prior_pictures: int = 0
    """Pictures of the class that the base makes for prior preservation; 0: none."""
    prior_weight: float = 1.0
    """Weight of the prior's loss beside the subject's."""

    def __post_init__(self) -> None:
        check(bool(self.token.strip()), "A subject needs a token, the word that will call it.")
        check(len(self.token) <= 64 and len(self.class_name) <= 64, "Token and class have at most 64 characters.")
        for name, low, high in _RANGES:
            check_range(name, getattr(self, name), low, high)
        for name, low, high in _OPTIONAL_RANGES:
            if getattr(self, name) is not None:
                check_range(name, getattr(self, name), low, high)

    @property
    def phrase(self) -> str:
        """What calls the subject in a prompt, for instance "zwx robot"."""
        return f"{self.token.strip()} {self.class_name.strip()}".strip()


_RANGES = (
    ("rank", 1, 256), ("steps", 1, 100_000), ("seed", 0, 2**32 - 1), ("pool", 1, 4096),
    ("prior_pictures", 0, 512), ("prior_weight", 0, 10),
)  # fmt: skip
_OPTIONAL_RANGES = (
    ("batch", 1, 64),
    ("alpha", 1, 1024),
    ("lr", 1e-8, 1.0),
    ("snr_gamma", 0.1, 100),
    ("resolution", 8, 2048),
)


class SubjectTask:
    """Trains a LoRA on the UNet through PEFT; see :class:`training.loop.Task`."""

    name = "subject"

    def __init__(self, config: SubjectConfig, base: Base, pipe: Any, subject: Subject) -> None:
        """Encode the pictures and prompts and attach a fresh adapter; :meth:`close` takes it off again."""
        if not subject.views:
            raise InvalidRequest(f"{subject.name} has no picture to learn from; give at least one.")
        self.config, self.base, self.pipe = config, base, pipe
        self.total_steps = config.steps
        self.batch = config.batch or BATCHES.get(base.family, BATCH)
        self.device = pipe.unet.device
        self.precision: Precision = choose_precision(config.precision, base, self.device)
        size = config.resolution or base.resolution
        base.latent_shape(size, size)
        flip = not base.on_slots if config.flip is None else config.flip
        self.pool = view_pool(pipe, base, subject, size, config.pool, config.seed, flip=flip)
        self.prior = self._prior(size)
        captions = [*self.pool.captions, *(self.prior.captions if self.prior else ())]
        self.prompts = EncodedPrompts(base, pipe, captions, size)
        self.parameters = attach_adapter(pipe.unet, base, config)
        self.optimiser = torch.optim.AdamW(self.parameters.values(), lr=self._rate(), weight_decay=1e-2)

    def step(self, index: int) -> dict[str, float]:
        """One optimiser step on a batch of subject pictures, and as many of the class with prior preservation."""
        generator = step_generator(self.config.seed, 1, index)
        self.pipe.unet.train()
        self.optimiser.zero_grad(set_to_none=True)
        loss = self._loss(self.pool, generator)
        metrics = {}
        if self.prior is not None:
            prior = self._loss(self.prior, generator)
            metrics["prior_loss"] = prior.item()
            loss = loss + self.config.prior_weight * prior
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(list(self.parameters.values()), 1.0)
        self.optimiser.step()
        return {"loss": loss.item(), "grad_norm": norm.item(), **metrics}

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
        """One picture of the subject on a blue background."""
        from training.samples import make_sample

        self.pipe.unet.eval()
        prompt = f"{article(self.config.phrase)} on a blue background"
        yield make_sample(self.pipe, self.base, prompt, folder / f"{step:06d}.png", step, seed=self.config.seed)

    def finish(self, out: Path) -> dict[str, Any]:
        """Save the expert as a safetensors file that diffusers and this project read."""
        from mole_diffusion.experts import save_expert

        config = self.config
        metadata = {
            "modelspec.trigger_phrase": config.phrase,
            "modelspec.title": config.name or out.stem,
            "mole.base": self.base.family,
            "mole.class": config.class_name,
        }
        out.parent.mkdir(parents=True, exist_ok=True)
        save_expert(adapter_modules(self.pipe.unet), out, format="diffusers", metadata=metadata)
        return {"path": str(out), "trigger": config.phrase, "base": self.base.family, "rank": config.rank}

    def close(self) -> None:
        """Take the adapter off: the UNet is the base's again."""
        self.pipe.unet.unload_lora()

    def _rate(self) -> float:
        return self.config.lr or LEARNING_RATES.get(self.base.family, LEARNING_RATE)

    def _prior(self, size: int) -> ViewPool | None:
        config = self.config
        if not config.prior_pictures or not config.prior_weight:
            return None
        check(bool(config.class_name.strip()), "Prior preservation needs the subject's class.")
        return class_pool(self.pipe, self.base, config.class_name, size, config.prior_pictures, config.seed)

    def _loss(self, pool: ViewPool, generator: torch.Generator) -> Tensor:
        chosen = torch.randint(0, len(pool.captions), (self.batch,), generator=generator)
        latents = pool.latents[chosen.to(pool.latents.device)]
        steps = self.pipe.scheduler.config.num_train_timesteps
        noise, t = draw_noise(latents.shape, steps, generator, self.device)
        conditioning = self.prompts.rows([pool.captions[number] for number in chosen.tolist()])
        with autocast(self.device, self.precision):
            errors = squared_error(self.pipe, self.base, latents, noise, t, conditioning)
        if pool.weights is not None:
            errors = errors * pool.weights[chosen.to(pool.weights.device)]
        errors = errors.mean((1, 2, 3))
        if self.config.snr_gamma is not None:
            errors = errors * min_snr_weights(self.pipe, self.base, t, self.config.snr_gamma)
        return errors.mean()


def attach_adapter(unet: Any, base: Base, config: SubjectConfig) -> dict[str, torch.nn.Parameter]:
    """Add a LoRA to the base's target modules and give its parameters by name, float32. Seeded by the configuration."""
    from peft import LoraConfig

    settings = LoraConfig(
        r=config.rank, lora_alpha=config.alpha or config.rank, target_modules=list(base.target_paths("unet")),
        init_lora_weights=True, lora_dropout=0.0,
    )  # fmt: skip
    with torch.random.fork_rng(), warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        torch.manual_seed(config.seed)
        unet.add_adapter(settings, adapter_name=ADAPTER)
    parameters = {name: value for name, value in unet.named_parameters() if value.requires_grad}
    for value in parameters.values():
        value.data = value.data.float()
    return parameters


def adapter_modules(unet: Any) -> dict[str, Any]:
    """The trained adapter in canonical form: "unet.<path>" → LowRank."""
    from peft.tuners.lora import LoraLayer

    from mole_diffusion.experts.canonical import LowRank

    found = {}
    for path, module in unet.named_modules():
        if isinstance(module, LoraLayer) and ADAPTER in module.lora_A:
            layer: Any = module
            a = layer.lora_A[ADAPTER].weight.detach().cpu().clone()
            b = layer.lora_B[ADAPTER].weight.detach().cpu().flatten(1).clone()
            found[f"unet.{path}"] = LowRank(a, b, float(module.scaling[ADAPTER]))
    return found
