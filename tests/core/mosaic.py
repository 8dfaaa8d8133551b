"""Small modules with MoSLoRA adapters, and what they should compute, in plain tensor algebra."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mole_diffusion.adapters import MoSLoraConfig, add_moslora
from tests.core.small import make_sd

TARGETS = ["convolution", "pointwise", "linear"]
UNET_TARGETS = ["to_q", "to_k", "to_v", "to_out.0", "conv1", "conv_in"]


class Toy(nn.Module):
    """One 3×3 convolution with stride, one 1×1 convolution, one linear layer: (rows, 3, 6, 6) → (rows, 5)."""

    def __init__(self) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(3, 8, 3, stride=2, padding=1)
        self.pointwise = nn.Conv2d(8, 8, 1)
        self.linear = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.pointwise(torch.tanh(self.convolution(x))).mean((2, 3)))


def close(left: Tensor, right: Tensor, tolerance: float = 1e-5) -> bool:
    return float((left - right).detach().abs().max()) <= tolerance


def toy(seed: int = 0) -> Toy:
    torch.manual_seed(seed)
    return Toy().requires_grad_(False)


def pictures(rows: int = 3, seed: int = 1) -> Tensor:
    return torch.randn(rows, 3, 6, 6, generator=torch.Generator().manual_seed(seed))


def config(**settings: Any) -> MoSLoraConfig:
    return MoSLoraConfig(**{"r": 4, "lora_alpha": 6, "target_modules": TARGETS, **settings})


def attached(adapter: str = "default", model: Any = None, **settings: Any) -> Any:
    """A toy with an adapter that is away from its zero start."""
    model = add_moslora(toy() if model is None else model, config(**settings), adapter)
    shake(model, adapter)
    return model.eval()


def shake(model: nn.Module, adapter: str = "default", seed: int = 2, size: float = 0.4) -> None:
    """Move the trained factors of one adapter."""
    random = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_" in name and f".{adapter}." in name:
                parameter.add_(torch.randn(parameter.shape, generator=random) * size)


def expected(plain: Toy, model: Any, x: Tensor, adapter: str = "default") -> Tensor:
    """W0·x + (α/r)·B·W·A·x of every layer, one operation at a time."""
    layers = model.base_model.model

    def factors(name: str) -> tuple[Tensor, Tensor, Tensor, float]:
        layer = getattr(layers, name)
        a, b = layer.lora_A[adapter].weight, layer.lora_B[adapter].weight
        return a, layer.lora_mixer[adapter].weight, b, layer.lora_alpha[adapter] / layer.r[adapter]

    a, w, b, scale = factors("convolution")
    hidden = torch.einsum("ij,njhw->nihw", w, F.conv2d(x, a, stride=2, padding=1))
    x = torch.tanh(plain.convolution(x) + scale * torch.einsum("oi,nihw->nohw", b[..., 0, 0], hidden))
    a, w, b, scale = factors("pointwise")
    delta = b[..., 0, 0] @ w @ a[..., 0, 0]
    x = (plain.pointwise(x) + scale * torch.einsum("oi,nihw->nohw", delta, x)).mean((2, 3))
    a, w, b, scale = factors("linear")
    return plain.linear(x) + scale * ((x @ a.T) @ w.T) @ b.T


def moslora_unet(**settings: Any) -> Any:
    """The tiny pipeline whose UNet has a shaken adapter "subject" of mixed ranks."""
    pipe = make_sd()
    patterns = {"rank_pattern": {"conv_in": 2}, "alpha_pattern": {"conv1": 3}}
    chosen = {"r": 4, "lora_alpha": 8, "target_modules": UNET_TARGETS, **patterns, **settings}
    assert add_moslora(pipe.unet, MoSLoraConfig(**chosen), "subject") is pipe.unet
    shake(pipe.unet, "subject", size=0.2)
    return pipe


def train(model: nn.Module, steps: int = 2) -> list[dict[str, bool]]:
    """Plain gradient steps; which parameters had a gradient in each."""
    trained = {name: value for name, value in model.named_parameters() if value.requires_grad}
    optimiser = torch.optim.SGD(list(trained.values()), lr=0.5)
    seen = []
    for step in range(steps):
        optimiser.zero_grad()
        (model(pictures(seed=step)) - 1).square().mean().backward()
        seen.append({name: bool(value.grad is not None and value.grad.any()) for name, value in trained.items()})
        optimiser.step()
    return seen
