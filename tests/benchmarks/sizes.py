"""What is measured on: UNets with random weights, and random experts with the statistics of real ones."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from mole_diffusion.bases.config_files import SHIPPED, read_configs
from mole_diffusion.experts import Expert, LowRank
from tests.core.small import SD_TARGETS, make_sd, make_sdxl, shapes_of

TEXT_TOKENS = 77
SMALL: dict[str, Any] = {
    "sample_size": 32,
    "block_out_channels": (128, 256),
    "layers_per_block": 1,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    "cross_attention_dim": 256,
    "attention_head_dim": (4, 8),
    "use_linear_projection": True,
}
TOY: dict[str, Any] = {
    **SMALL,
    "sample_size": 8,
    "block_out_channels": (16, 32),
    "cross_attention_dim": 24,
    "attention_head_dim": (2, 4),
    "norm_num_groups": 4,
}
SIZES: dict[str, Callable[[], Mapping[str, Any]]] = {
    "toy": lambda: TOY,
    "small": lambda: SMALL,
    "sd21": lambda: read_configs(SHIPPED / "sd21.json")["unet"],
    "sdxl": lambda: read_configs(SHIPPED / "sdxl.json")["unet"],
}


class Stage:
    """A pipeline, the input of one UNet call, and the experts.

    Text towers and VAE are tiny: the experts do not touch them and nothing runs them.

    Attributes:
        pipe: a real pipeline whose UNet has the asked size.
        inputs: keyword arguments of the UNet; rows are [unconditional, conditional], the sides are the size's own.
    """

    def __init__(self, size: str, device: str, *, rank: int = 16, batch: int = 2, seed: int = 0) -> None:
        from diffusers import UNet2DConditionModel

        self.size, self.rank, self.seed = size, rank, seed
        self.device = torch.device(device)
        self.dtype = torch.float32 if self.device.type == "cpu" else torch.bfloat16
        config = {key: value for key, value in SIZES[size]().items() if not key.startswith("_")}
        self.pipe = make_sdxl() if config.get("addition_embed_type") else make_sd()
        torch.manual_seed(seed)
        with self.device:
            unet: Any = UNet2DConditionModel(**config)
        if self.dtype != torch.float32:
            unet.to(self.dtype)
        unet.eval().requires_grad_(False)
        self.pipe.register_modules(unet=unet)
        self.inputs = self._inputs(batch)
        self.call(unet)  # what torch sets up once is nobody's time or memory

    def _inputs(self, batch: int) -> dict[str, Any]:
        config = self.pipe.unet.config
        random = torch.Generator().manual_seed(self.seed + 1)

        def values(*shape: int) -> Tensor:
            return torch.randn(batch, *shape, generator=random).to(self.device, self.dtype)

        side = config.sample_size
        inputs: dict[str, Any] = {
            "sample": values(config.in_channels, side, side),
            "timestep": torch.tensor(500, device=self.device),
            "encoder_hidden_states": values(TEXT_TOKENS, config.cross_attention_dim),
        }
        if config.addition_embed_type:
            pooled = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
            inputs["added_cond_kwargs"] = {"text_embeds": values(pooled), "time_ids": values(6).abs()}
        return inputs

    def call(self, unet: Any) -> Tensor:
        """One UNet call without a graph, as pipelines make it."""
        with torch.no_grad():
            return unet(**self.inputs, return_dict=False)[0]

    def twin(self, *, own_weights: bool = False) -> Any:
        """The pipeline with a UNet of its own: new modules, the same weights, or copies where they will be written."""
        unet = self.pipe.unet
        shared = {} if own_weights else {id(held): held for held in (*unet.parameters(), *unet.buffers())}
        pipe = copy.copy(self.pipe)
        pipe.register_modules(unet=copy.deepcopy(unet, shared))
        return pipe

    def experts(self, count: int) -> list[Expert]:
        """Experts 0 … count - 1; the same ones at every call."""
        shapes = shapes_of(self.pipe)
        keys = [key for key in shapes if key.endswith(tuple(f".{target}" for target in SD_TARGETS))]
        return [self._expert(index, {key: shapes[key] for key in keys}) for index in range(count)]

    def _expert(self, index: int, shapes: Mapping[str, tuple[int, ...]]) -> Expert:
        """A as LoRA initialises it, U(±1/√d_in); B small but not zero, as training leaves it. No trigger, α = rank."""
        random = torch.Generator().manual_seed(1000 * (self.seed + 1) + index)
        modules = {}
        for key, (d_out, d_in, *_) in shapes.items():
            a = (torch.rand(self.rank, d_in, generator=random) * 2 - 1) / math.sqrt(d_in)
            b = torch.randn(d_out, self.rank, generator=random) * 0.02
            modules[key] = LowRank(a.to(self.dtype), b.to(self.dtype))
        return Expert(f"expert{index}", modules, sha256=f"{index:064x}")  # hashing gigabytes is not measured
