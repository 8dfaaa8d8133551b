"""Tiny bases on disk, subjects, experts and ready tasks for the training tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from mole_diffusion.bases import Base, get_base
from tests.tiny import cut_out, tiny_lora, tiny_sd, tiny_sdxl
from training.data.subjects import Subject

COLOURS = {"robot": "#d02020", "alien": "#20a020"}
MAKERS = {
    "sd-v": lambda: tiny_sd("v_prediction"),
    "sd-epsilon": lambda: tiny_sd("epsilon"),
    "sdxl": lambda: tiny_sdxl(),
}


def save_base(folder: Path, kind: str) -> Path:
    """Save a tiny pipeline as a folder that ``get_base`` reads."""
    MAKERS[kind]().save_pretrained(folder)
    return folder


def load(folder: Path) -> tuple[Base, Any]:
    base = get_base(folder)
    return base, base.load("cpu", torch.float32)


def subject(name: str) -> Subject:
    views = tuple(cut_out(COLOURS[name], turn=turn) for turn in (-20.0, 0.0, 20.0))
    return Subject(name, f"zwx {name}", views)


def lora(folder: Path, pipe: Any, name: str, *, seed: int, **options: Any) -> Path:
    metadata = {"modelspec.trigger_phrase": f"zwx {name}", "mole.class": name}
    return tiny_lora(folder / f"{name}.safetensors", pipe, seed=seed, metadata=metadata, **options)


def tensors_of(pipe: Any) -> dict[str, torch.Tensor]:
    """Copies of all weights of the pipeline's networks."""
    parts = {name: part for name, part in pipe.components.items() if isinstance(part, torch.nn.Module)}
    return {f"{name}.{key}": value.clone() for name, part in parts.items() for key, value in part.state_dict().items()}


def same(one: dict[str, torch.Tensor], two: dict[str, torch.Tensor]) -> bool:
    return one.keys() == two.keys() and all(torch.equal(one[key], two[key]) for key in one)
