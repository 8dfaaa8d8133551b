"""One resumable training stage of the demo base: a model, its optimiser, an average of its weights and a clock.

The schedule follows the *budget* (steps or minutes, whichever is used up first), so that one command suits
a laptop and a GPU. A checkpoint is a folder of safetensors and JSON, written beside and renamed.
"""

from __future__ import annotations

import json
import logging
import math
import os
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from mole_diffusion.errors import InvalidRequest
from training.base.muon import MuonAdamW

logger = logging.getLogger(__name__)
SAVE_SECONDS = 240


@dataclass(frozen=True)
class Budget:
    """``steps`` at most, ``minutes`` at most; the learning rate warms up, stays and decays along the budget."""

    steps: int
    minutes: float
    lr: float
    warmup: float = 0.02
    ema: float = 0.999

    def progress(self, step: int, seconds: float) -> float:
        """Share of the budget used, 0..1."""
        return min(1.0, max(step / self.steps, seconds / (60 * self.minutes)))

    def rate(self, progress: float) -> float:
        """Learning rate: linear warm-up, constant, cosine over the last half."""
        if progress < self.warmup:
            return self.lr * max(progress, 1e-3) / self.warmup
        fall = max(0.0, 2 * progress - 1)
        return self.lr * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * fall)))


class Stage:
    """Trains ``model`` on ``loss(step, progress) -> Tensor`` until the budget is used; resumes from ``folder``."""

    def __init__(self, name: str, model: nn.Module, budget: Budget, folder: Path, weight_decay: float = 0.01,
                 rates: Mapping[str, float] | None = None, muon: bool = False) -> None:  # fmt: skip
        """``rates`` gives parameters whose names start with a prefix a fraction of the learning rate.

        ``muon`` updates maps between features by Muon instead of AdamW.
        """
        self.name, self.model, self.budget, self.folder = name, model, budget, folder / name
        # Embeddings of words that were never seen must not decay to nothing: they are tomorrow's triggers.
        embeddings = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
        groups: dict[tuple[float, float], list[nn.Parameter]] = {}
        for key, parameter in model.named_parameters():
            if parameter.requires_grad:
                rate = next((value for prefix, value in (rates or {}).items() if key.startswith(prefix)), 1.0)
                decays = parameter.ndim > 1 and id(parameter) not in embeddings
                groups.setdefault((rate, weight_decay if decays else 0.0), []).append(parameter)
        self._rates = [rate for rate, _ in groups]
        listed = [{"params": members, "weight_decay": decay, "lr": budget.lr} for (_, decay), members in groups.items()]
        self.optimiser: Any = (
            MuonAdamW(listed, (0.9, 0.99)) if muon else torch.optim.AdamW(listed, betas=(0.9, 0.99), fused=True)
        )
        count = sum(len(group["params"]) for group in listed)
        self._moments = f"{type(self.optimiser).__name__} of {count}"
        self.ema = {key: value.detach().clone() for key, value in model.state_dict().items()}
        self.step, self.seconds = 0, 0.0

    def train(self, loss: Callable[[int, float], Tensor], sample: Callable[[Path], None] | None = None) -> None:
        """Run to the end of the budget; logs every 50 steps, saves (and samples) every ``SAVE_SECONDS``."""
        self._resume()
        with torch.no_grad():
            for key, parameter in self.model.named_parameters():
                if not parameter.requires_grad:  # the rest learns with what it is now, not with its average
                    self.ema[key].copy_(parameter)
        self.model.train()
        started, saved, mean = time.monotonic() - self.seconds, time.monotonic(), math.nan
        while (progress := self.budget.progress(self.step, self.seconds)) < 1.0:
            for group, factor in zip(self.optimiser.param_groups, self._rates, strict=True):
                group["lr"] = self.budget.rate(progress) * factor
            value = loss(self.step, progress)
            if not value.isfinite():
                raise InvalidRequest(
                    f"{self.name}: the loss is {value.item()} at step {self.step}; start again from the checkpoint in "
                    f"{self.folder} with a lower learning rate."
                )
            value.backward()
            nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
            self.optimiser.step()
            self.optimiser.zero_grad(set_to_none=True)
            self._average()
            self.step += 1
            self.seconds = time.monotonic() - started
            mean = value.item() if math.isnan(mean) else 0.98 * mean + 0.02 * value.item()
            if self.step % 50 == 0:
                share = 100 * progress
                logger.info("%s step %d loss %.4f, %.0f s, %.0f %%", self.name, self.step, mean, self.seconds, share)
            if time.monotonic() - saved > SAVE_SECONDS:
                self.save()
                if sample is not None:
                    self.with_average(lambda: sample(self.folder / f"sheet-{self.step:06d}.png"))
                saved = time.monotonic()
        self.save()

    def with_average(self, call: Callable[[], None]) -> None:
        """Run ``call`` with the averaged weights in the model."""
        live = {key: value.detach().clone() for key, value in self.model.state_dict().items()}
        self.model.load_state_dict(self.ema)
        self.model.eval()
        with torch.no_grad():
            call()
        self.model.load_state_dict(live)
        self.model.train()

    def use_average(self) -> nn.Module:
        """Put the averaged weights into the model for good and return it in evaluation mode."""
        self.model.load_state_dict(self.ema)
        return self.model.eval()

    def _average(self) -> None:
        decay = min(self.budget.ema, (1 + self.step) / (10 + self.step))
        state = self.model.state_dict()
        floats = [key for key, value in state.items() if value.is_floating_point()]
        torch._foreach_lerp_([self.ema[key] for key in floats], [state[key] for key in floats], 1 - decay)

    def save(self) -> None:
        """Write model, average, optimiser and clock; a killed process leaves the previous checkpoint whole."""
        temporary = self.folder / "checkpoint.new"
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        contiguous = lambda tensors: {k: v.detach().contiguous().clone() for k, v in tensors.items()}  # noqa: E731
        save_file(contiguous(self.model.state_dict()), temporary / "model.safetensors")
        save_file(contiguous(self.ema), temporary / "ema.safetensors")
        moments = {
            f"{index}.{key}": value
            for index, state in self.optimiser.state_dict()["state"].items()
            for key, value in state.items()
        }
        save_file(contiguous(moments), temporary / "optimiser.safetensors")
        clock = {"step": self.step, "seconds": self.seconds, "optimiser": self._moments}
        (temporary / "state.json").write_text(json.dumps(clock))
        final, old = self.folder / "checkpoint", self.folder / "checkpoint.old"
        shutil.rmtree(old, ignore_errors=True)
        if final.exists():
            os.replace(final, old)
        os.replace(temporary, final)
        shutil.rmtree(old, ignore_errors=True)

    def _resume(self) -> None:
        final, old = self.folder / "checkpoint", self.folder / "checkpoint.old"
        folder = final if (final / "state.json").exists() else old
        if not (folder / "state.json").exists():
            return
        self.model.load_state_dict(load_file(folder / "model.safetensors"))
        for key, value in load_file(folder / "ema.safetensors").items():
            self.ema[key].copy_(value)
        clock = json.loads((folder / "state.json").read_text())
        self.step, self.seconds = clock["step"], clock["seconds"]
        if clock.get("optimiser", self._moments) != self._moments:
            logger.warning("%s: moments of %s mean nothing to %s", self.name, clock["optimiser"], self._moments)
        else:
            state: dict[int, dict[str, Tensor]] = {}
            for key, value in load_file(folder / "optimiser.safetensors").items():
                index, field = key.split(".", 1)
                state.setdefault(int(index), {})[field] = value
            groups = self.optimiser.state_dict()["param_groups"]
            self.optimiser.load_state_dict({"state": state, "param_groups": groups})
        logger.info("%s resumes at step %d", self.name, self.step)
