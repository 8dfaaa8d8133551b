"""How much device memory training takes, estimated by counting: weights, adapter, optimiser, activations."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

from mole_diffusion.bases import Base
from training.tasks.subject_adapter import target_paths, trained_components
from training.tasks.subject_config import SubjectConfig

VAE_PARAMETERS = 84e6
"""Of the autoencoder of every Stable Diffusion."""
OVERHEAD = 0.7e9
"""The driver's context and the allocator's gaps, in bytes."""
BETWEEN = 2.0
"""Norms, activation functions and residual sums between the counted modules hold about as much again."""
ENCODER_MAPS = 4 * 128
"""Channels at full resolution that the autoencoder holds at once while it encodes a picture in float32."""
GIB = 2**30


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes by use."""

    weights: float
    adapter: float
    optimiser: float
    activations: float
    preparation: float
    """Before the first step, when pictures and prompts are encoded: weights and the autoencoder's activations."""

    @property
    def gib(self) -> float:
        """The most that is held at once, in GiB, with what a driver needs."""
        step = self.weights + self.adapter + self.optimiser + self.activations
        return (max(step, self.preparation) + OVERHEAD) / GIB


def estimate(base: Base, config: SubjectConfig) -> MemoryEstimate:
    """What a subject's training holds on a GPU: an estimate that no measurement stands behind.

    Counted are the matrices of ``base.module_shapes()`` in the precision of the step, adapter and gradients in float32,
    two moments a parameter, and inputs and outputs of every module of the UNet: all of them, or with gradient
    checkpointing those of the largest block beside one input a block. Attention is taken to be of the fused kind.
    """
    half = (config.precision or ("bfloat16" if base.full_size else "float32")) == "bfloat16"
    shapes, size = base.module_shapes(), 2 if half else 4
    side = config.resolution or base.resolution
    waiting = config.offload and not config.train_text_encoders
    resident = {key: prod(shape) for key, shape in shapes.items() if key.startswith("unet.") or not waiting}
    trained = sum(
        config.rank * (shapes[f"{component}.{path}"][0] + prod(shapes[f"{component}.{path}"][1:]))
        + (config.rank**2 if config.adapter == "moslora" else 0)
        for component in trained_components(base, config)
        for path in target_paths(base, config, component)
    )
    weights = (sum(resident.values()) + (0 if waiting else VAE_PARAMETERS)) * size
    moments = 2 * trained if config.optimiser == "adamw8bit" else 8 * trained
    everything = sum(map(prod, shapes.values())) * size + 4 * VAE_PARAMETERS
    preparation = everything + 4.0 * ENCODER_MAPS * side**2
    return MemoryEstimate(weights, 8.0 * trained, float(moments), _activations(base, config, size), preparation)


def _activations(base: Base, config: SubjectConfig, size: int) -> float:
    """Bytes of what the backward pass reads again."""
    _, height, width = base.latent_shape(*[config.resolution or base.resolution] * 2)
    blocks = base.block_paths()
    levels = _levels(blocks)
    sums: dict[str, float] = {}
    inputs: dict[str, float] = {}
    for key, shape in base.module_shapes().items():
        path = key.removeprefix("unet.")
        block = next((item for item in blocks if path.startswith(f"{item}.")), "")
        if not key.startswith("unet.") or not block:
            continue
        places = height * width / 4 ** _level(path, levels)
        sums[block] = sums.get(block, 0.0) + places * (shape[0] + shape[1])
        inputs.setdefault(block, places * shape[1])
    checkpointed = base.full_size if config.checkpointing is None else config.checkpointing
    numbers = max(sums.values()) + sum(inputs.values()) if checkpointed else sum(sums.values())
    return BETWEEN * numbers * size * config.pictures_at_once(base.family)


def _levels(blocks: tuple[str, ...]) -> int:
    """How many times the UNet's resolution is halved, plus one."""
    return 1 + max(int(path.split(".")[1]) for path in blocks if path.startswith("down_blocks."))


def _level(path: str, levels: int) -> int:
    """Halvings of the grid at which a module works."""
    part, number = path.split(".")[:2]
    if part == "mid_block":
        return levels - 1
    return int(number) if part == "down_blocks" else levels - 1 - int(number)
