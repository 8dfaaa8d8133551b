"""Where two experts will get into each other's way, from their files alone.

For updates ΔW₁ and ΔW₂ of one layer, ‖ΔW₁ ΔW₂ᵀ‖ / n says how far both answer to the same inputs and ‖ΔW₁ᵀ ΔW₂‖ / n how
far both write into the same outputs, with n = √(‖ΔW₁ ΔW₁ᵀ‖ ‖ΔW₂ ΔW₂ᵀ‖) and Frobenius norms: 0 for orthogonal spaces, 1
for equal ones. They collide where they do both: the geometric mean.
"""

from __future__ import annotations

import re
from collections import defaultdict
from dataclasses import dataclass

import torch
from torch import Tensor

from mole_diffusion.experts.canonical import Expert, LowRank

_BLOCK = re.compile(
    r"(?P<component>\w+)\.(?:text_model\.)?(?P<block>(?:(?:down|up)_blocks\.\d+|mid_block)\.\w+\.\d+"
    r"(?:\.transformer_blocks\.\d+)?|encoder\.layers\.\d+)"
)


@dataclass(frozen=True)
class Overlap:
    """Of one block, or of whole experts; 0…1 each.

    Attributes:
        block: "<component>.<block path>", or "all".
        reads: both answer to the same inputs.
        writes: both write into the same outputs.
        share: of all n, how much is here.
    """

    block: str
    reads: float
    writes: float
    share: float

    @property
    def collision(self) -> float:
        """Both read and write alike."""
        return (self.reads * self.writes) ** 0.5


@dataclass(frozen=True)
class Forecast:
    """``whole`` over all layers that both change, 0 where there are none; ``blocks`` by falling collision."""

    whole: Overlap
    blocks: tuple[Overlap, ...]

    def sentence(self, name: str) -> str:
        """One line for a person about the expert that stands beside."""
        if not self.blocks:
            return f"Beside {name}: no layer in common."
        worst = ", ".join(f"{found.block} {found.collision:.2f}" for found in self.blocks[:3])
        return (
            f"Beside {name}: overlap {self.whole.collision:.2f} (0 apart, 1 the same; inputs {self.whole.reads:.2f}, "
            f"outputs {self.whole.writes:.2f}), most in {worst}."
        )


def forecast_collisions(first: Expert, second: Expert) -> Forecast:
    """How two experts overlap in every block that both change."""
    sums: defaultdict[str, Tensor] = defaultdict(lambda: torch.zeros(3, dtype=torch.float64))
    for key in first.modules.keys() & second.modules.keys():
        one, other = first.modules[key], second.modules[key]
        fitted = other.reshaped(one.weight_shape)
        if fitted is not None:
            sums[_block(key)] += _norms(one, fitted)
    total = torch.stack(list(sums.values())).sum(0) if sums else torch.zeros(3, dtype=torch.float64)
    blocks = [_overlap(block, values, total) for block, values in sums.items() if float(values[2]) > 0]
    return Forecast(_overlap("all", total, total), tuple(sorted(blocks, key=lambda o: (-o.collision, o.block))))


def _block(key: str) -> str:
    match = _BLOCK.match(key)
    return f"{match['component']}.{match['block']}" if match else key


def _norms(one: LowRank, other: LowRank) -> Tensor:
    """(‖ΔW₁ΔW₂ᵀ‖, ‖ΔW₁ᵀΔW₂‖, n) through r×r matrices: ‖B₁ M B₂ᵀ‖² = tr(B₁ᵀB₁ M B₂ᵀB₂ Mᵀ)."""
    b1, b2 = one.b.double(), other.b.double()
    a1, a2 = one.a.double().flatten(1), other.a.double().flatten(1)
    in1, in2, out1, out2 = a1 @ a1.T, a2 @ a2.T, b1.T @ b1, b2.T @ b2
    rows, columns = _norm(out1, a1 @ a2.T, out2), _norm(in1, b1.T @ b2, in2)
    alone = (_norm(out1, in1, out1) * _norm(out2, in2, out2)).sqrt()
    return abs(one.scale * other.scale) * torch.stack([rows, columns, alone])


def _norm(left: Tensor, middle: Tensor, right: Tensor) -> Tensor:
    """√tr(left · middle · right · middleᵀ)."""
    return (left @ middle @ right @ middle.T).trace().clamp(min=0).sqrt()


def _overlap(block: str, values: Tensor, total: Tensor) -> Overlap:
    rows, columns, sizes = values.tolist()
    everything = float(total[2])
    return Overlap(block, rows / sizes if sizes else 0.0, columns / sizes if sizes else 0.0,
                   sizes / everything if everything else 0.0)  # fmt: skip
