"""The base that a task trains on, on the device that was asked for."""

from __future__ import annotations

import os
from typing import Any

from mole_diffusion.bases import Base, choose_placement, get_base
from training.objectives.denoise import choose_precision


def load_base(name: str, precision: str | None, checkpointing: bool | None = None) -> tuple[Base, Any]:
    """A base and its pipeline on the best device, ready to train on: (base, pipe).

    ``checkpointing``: compute activations twice instead of keeping them; None: for full-size bases on a GPU, where it
    costs a third of the time and lets them fit into consumer cards.
    """
    import torch
    from diffusers.models.attention_processor import AttnProcessor

    if torch.get_num_threads() != (os.cpu_count() or 1) and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(os.cpu_count() or 1)
    base, device = get_base(name), choose_placement(device_asked_for()).device
    chosen = choose_precision(precision, base, device)  # type: ignore[arg-type]
    half = chosen == "bfloat16" and device.type == "cuda"
    pipe = base.load(device, torch.bfloat16 if half else torch.float32)
    if device.type == "cpu":
        pipe.unet.set_attn_processor(AttnProcessor())  # the fused attention's backward takes 40 % of a CPU step
    if checkpointing or (checkpointing is None and base.full_size and device.type != "cpu"):
        pipe.unet.enable_gradient_checkpointing()
    return base, pipe


def device_asked_for() -> str | None:
    """The device that the user named (the page and the commands say so in MOLE_DEVICE), None for the best one."""
    name = os.environ.get("MOLE_DEVICE", "")
    return None if name in ("", "auto") else name
