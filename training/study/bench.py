"""What every part of the study shares: the base, its subjects, the judges, pictures, files of results."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mole_diffusion import Expert
from mole_diffusion.bases import get_base
from mole_diffusion.errors import InvalidRequest
from mole_diffusion.generation import GenerationRequest, generate
from mole_diffusion.scoring.alignment import load_alignment
from mole_diffusion.scoring.intervals import bootstrap_interval
from mole_diffusion.scoring.views import load_views
from training.base.scenes import COLOURS
from training.data.paste import to_tensor
from training.study.judge import SubjectJudge

Job = tuple[Path, Callable[[], dict[str, Any]]]
"""Where a result goes, and what makes it; one whose file exists is not made again."""


@dataclass
class Bench:
    """The base, its subjects with their held-out views, and who judges pictures of them."""

    root: Path
    steps: int
    seeds: int

    def __post_init__(self) -> None:
        self.base = get_base("demo")
        self.pipe = self.base.load(torch.device("cpu"), torch.float32)
        self.alignment = load_alignment(self.base, torch.device("cpu"))
        folder = self.root / "subjects"
        self.cards = {path.parent.name: json.loads(path.read_text()) for path in sorted(folder.glob("*/subject.json"))}
        if not self.cards:
            raise InvalidRequest(f"There are no demo subjects below {folder}: run 'training base --stages subjects'.")
        self.names = tuple(self.cards)
        self.views = {name: load_views(folder / name / "heldout") for name in self.names}
        self.posed = {name: load_views(folder / name / "train") for name in self.names}

    @cached_property
    def single(self) -> SubjectJudge:
        """Judges pictures of one subject."""
        return SubjectJudge(self.base, self.pipe, self.views, self.posed, 1)

    @cached_property
    def double(self) -> SubjectJudge:
        """Judges pictures of two subjects."""
        return SubjectJudge(self.base, self.pipe, self.views, self.posed, 2)

    def phrase(self, name: str) -> str:
        """Trigger and class, for instance "sks robot"."""
        return f"{self.cards[name]['trigger']} {self.cards[name]['class']}"

    def expert(self, name: str) -> Expert:
        """The shipped LoRA of a subject."""
        return Expert.load(self.root / "experts" / f"{name}.safetensors")

    def draw(self, prompts: Sequence[str], composition: Any = None) -> Tensor:
        """``seeds`` pictures of every prompt, (prompts * seeds, 3, H, W) in 0..1."""
        made = []
        for prompt in prompts:
            request = GenerationRequest(prompt, count=self.seeds, steps=20, score_every=0, preview_every=0)
            result = generate(self.pipe, self.base, request, composition=composition)
            made += [to_tensor(image) for image in result.images]
        return torch.stack(made)


def ground_of(picture: Tensor) -> str:
    """The named colour nearest to the median of a picture's border."""
    ring = torch.cat([picture[:, 0], picture[:, -1], picture[:, :, 0], picture[:, :, -1]], -1).median(-1).values * 255
    colours = torch.tensor(list(COLOURS.values()), dtype=torch.float32)
    return tuple(COLOURS)[int((colours - ring).square().sum(1).argmin())]


def interval(values: np.ndarray, groups: Sequence[Any]) -> dict[str, float]:
    found = bootstrap_interval(values, groups)
    return {"mean": found.mean, "low": found.low, "high": found.high}


def save_sheet(pictures: Tensor, columns: int, path: Path) -> None:
    from PIL import Image

    pixels = (pictures.permute(0, 2, 3, 1).numpy() * 255).astype(np.uint8)
    rows = [np.concatenate(list(pixels[i : i + columns]), 1) for i in range(0, len(pixels), columns)]
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.concatenate(rows, 0)).save(path)


def save(path: Path, record: dict[str, Any]) -> None:
    """One result, atomically."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".part")
    temporary.write_text(json.dumps(record) + "\n")
    os.replace(temporary, path)
