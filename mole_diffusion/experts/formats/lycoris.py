"""LyCORIS's other products (arXiv 2309.14859, sections 3.2 to 3.4) as low-rank pairs.

| parts of a module | its ΔW | as a pair |
|---|---|---|
| lora_down, lora_mid, lora_up | up × mid × down, a Tucker decomposition (LoCon) | exact, same rank |
| hada_w1_a, w1_b, w2_a, w2_b, optional hada_t1, t2 | (w1_a w1_b) ∘ (w2_a w2_b) (LoHa) | exact at rank r1 r2 |
| lokr_w1 or w1_a, w1_b; lokr_w2 or w2_a, w2_b, optional t2 | w1 ⊗ w2 (LoKr) | exact at rank r1 r2 |
| diff | ΔW itself | exact up to ``MAX_EXACT`` rows or columns |

A pair of more than ``MAX_EXACT`` ranks becomes the nearest one of that rank, and the relative error is stated. Products
are larger than the file that asks for them, so their size is checked before anything is multiplied.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from mole_diffusion.errors import InvalidFile
from mole_diffusion.experts.canonical import LowRank
from mole_diffusion.experts.formats.pairs import Built, Parts, read_alpha

MAX_EXACT = 256
MAX_ERROR = 0.3
_NUMBERS, _SEARCHED = 2**28, 2**30
_OVERSAMPLED, _POWER_STEPS = 32, 4
_BESIDE = {"alpha", "dora_scale"}
_LOHA = {f"hada_w{n}_{side}" for n in "12" for side in "ab"}
_CORES = {"hada_t1", "hada_t2"}
_FIRST = ({"lokr_w1"}, {"lokr_w1_a", "lokr_w1_b"})
_SECOND = ({"lokr_w2"}, {"lokr_w2_a", "lokr_w2_b"}, {"lokr_w2_a", "lokr_w2_b", "lokr_t2"})

Pair = tuple[Tensor, Tensor]
"""(out, r) and (r, in…), scale not applied."""


@dataclass
class Budget:
    """What one file may grow to: numbers in its pairs, and numbers in matrices that nearest pairs are searched in."""

    numbers: int = _NUMBERS
    searched: int = _SEARCHED

    def spend(self, *products: tuple[int, ...]) -> None:
        """Raises InvalidFile where arrays of these shapes are more than is left."""
        self.numbers -= sum(math.prod(shape) for shape in products)
        self._check()

    def search(self, *shape: int) -> None:
        """The same for a matrix that is searched for its nearest pair."""
        self.searched -= math.prod(shape)
        self._check()

    def _check(self) -> None:
        if self.numbers < 0 or self.searched < 0:
            raise InvalidFile("The products in this file would grow far beyond its own size: refused.")


def build_lycoris(module: str, parts: Parts, budget: Budget) -> Built | None:
    """The pair of a module whose parts are one row of the table above, all of them; None otherwise.

    Raises:
        InvalidFile: shapes that do not belong together, a product that no pair of ``MAX_EXACT`` ranks comes near or
            that is not finite, or one too many for ``budget``.
    """
    tensors = {name: tensor.float() for name, tensor in parts.tensors.items() if name not in _BESIDE}
    try:
        found = _product(tensors, budget)
    except (RuntimeError, ValueError, IndexError) as error:
        if isinstance(error, InvalidFile):
            raise
        shapes = ", ".join(f"{name} {tuple(tensor.shape)}" for name, tensor in tensors.items())
        raise InvalidFile(f"The weights of {module} do not belong together: {shapes}.") from error
    if found is None:
        return None
    (up, down), rank = found
    if not down.is_meta and not (up.isfinite().all() and down.isfinite().all()):
        raise InvalidFile(f"The weights of {module} multiply to infinity: the file is damaged.")
    alpha = read_alpha(module, parts.tensors.get("alpha"))
    up, down, error = _limited(module, up, down, budget)
    return Built(LowRank(down, up, alpha / rank if alpha and rank else 1.0), alpha or None, error)


def _product(t: Mapping[str, Tensor], budget: Budget) -> tuple[Pair, int] | None:
    """The pair of a product that uses every part, and the rank that α is divided by (0: α counts for nothing)."""
    names = set(t)
    if names == {"up", "mid", "down"}:
        down = _unfold(t["mid"], t["down"].flatten(1), budget)
        return _paired(t["up"].flatten(1), down), len(t["down"])
    if names in (_LOHA, _LOHA | _CORES):
        return _loha(t, budget)
    if any(names == first | second for first in _FIRST for second in _SECOND):
        return _lokr(t, budget)
    return (_halves(t["diff"], budget), 0) if names == {"diff"} else None


def _loha(t: Mapping[str, Tensor], budget: Budget) -> tuple[Pair, int]:
    """(B1 A1) ∘ (B2 A2) = (B1 ⊙ B2)(A1 ⊙ A2): products of every column of B1 with every one of B2, rows of A alike."""
    (b1, a1), (b2, a2) = (_factor(t, f"hada_w{n}_a", f"hada_w{n}_b", f"hada_t{n}", budget) for n in (1, 2))
    if a1.shape[1:] != a2.shape[1:] or len(b1) != len(b2):
        raise ValueError
    budget.spend((len(b1), len(a1), len(a2)), (len(a1), *a2.shape))
    up = (b1[:, :, None] * b2[:, None, :]).flatten(1)
    return (up, (a1[:, None] * a2[None]).flatten(0, 1)), len(a1)


def _lokr(t: Mapping[str, Tensor], budget: Budget) -> tuple[Pair, int]:
    """(B1 A1) ⊗ (B2 A2) = (B1 ⊗ B2)(A1 ⊗ A2); the scale's rank is that of a factor that has one, else scale 1."""
    split1, split2 = "lokr_w1_a" in t, "lokr_w2_a" in t
    b1, a1 = _factor(t, "lokr_w1_a", "lokr_w1_b", "", budget) if split1 else _halves(t["lokr_w1"], budget)
    b2, a2 = _factor(t, "lokr_w2_a", "lokr_w2_b", "lokr_t2", budget) if split2 else _halves(t["lokr_w2"], budget)
    if a1.ndim != 2:
        raise ValueError
    budget.spend((*b1.shape, *b2.shape), (*a1.shape, *a2.shape))
    down = torch.einsum("ai,bj->abij", a1, a2.flatten(1)).flatten(2).flatten(0, 1)
    down = down.reshape(len(down), a1.shape[1] * a2.shape[1], *a2.shape[2:])
    return (torch.kron(b1, b2), down), len(a2) if split2 else len(a1) if split1 else 0


def _factor(t: Mapping[str, Tensor], up: str, down: str, core: str, budget: Budget) -> Pair:
    """A pair whose convolution may be split once more: up is then (r, out), the core (r, r, k, k)."""
    if core not in t:
        return _paired(t[up], t[down])
    return _paired(t[up].T.contiguous(), _unfold(t[core], t[down], budget))


def _unfold(core: Tensor, down: Tensor, budget: Budget) -> Tensor:
    """(i, j, k, l) and (j, c) -> (i, c, k, l)."""
    budget.spend((core.shape[0], down.shape[1], *core.shape[2:]))
    return torch.einsum("ijkl,jc->ickl", core, down).contiguous()


def _paired(up: Tensor, down: Tensor) -> Pair:
    if up.ndim != 2 or up.shape[1] != len(down):
        raise ValueError
    return up, down


def _halves(weight: Tensor, budget: Budget) -> Pair:
    """A full weight (out, in…) as an exact pair with an identity on its smaller side."""
    if weight.ndim not in (2, 4) or not weight.numel():
        raise ValueError
    out, into = weight.shape[0], weight[0].numel()
    budget.spend((min(out, into), min(out, into)), (out, into))
    if out <= into:
        return torch.eye(out, device=weight.device), weight
    return weight.flatten(1), torch.eye(into, device=weight.device).reshape(into, *weight.shape[1:])


def _limited(module: str, up: Tensor, down: Tensor, budget: Budget) -> tuple[Tensor, Tensor, float]:
    """The pair itself, or its nearest of ``MAX_EXACT`` ranks (Eckart-Young) with the relative Frobenius error."""
    if len(down) <= MAX_EXACT:
        return up, down, 0.0
    budget.search(len(up), down[0].numel())
    if down.is_meta:
        rank = min(MAX_EXACT, len(up), down[0].numel())
        return up[:, :rank], down[:rank], math.nan
    size = float(up.abs().max()) * float(down.abs().max()) or 1.0  # a huge product must not overflow its own error
    delta = (up / up.abs().max().clamp(min=1e-38)) @ (down.flatten(1) / down.abs().max().clamp(min=1e-38))
    left, right = _nearest(delta, min(MAX_EXACT, *delta.shape))
    total = float(delta.double().square().sum())
    error = (float((delta - left @ right).double().square().sum()) / total) ** 0.5 if total else 0.0
    if error > MAX_ERROR:
        raise InvalidFile(
            f"{module} is not low-rank: its nearest pair of rank {len(right)} is {100 * error:.0f} % off (at most "
            f"{100 * MAX_ERROR:.0f} % is accepted). Merge this file into a model instead."
        )
    return left * size, right.reshape(-1, *down.shape[1:]), error


def _nearest(matrix: Tensor, rank: int) -> Pair:
    """A randomised singular value decomposition (arXiv 0909.4061, algorithm 4.4) with noise that is always the same."""
    width = min(rank + _OVERSAMPLED, *matrix.shape)
    basis = matrix @ torch.randn(matrix.shape[1], width, generator=torch.Generator().manual_seed(0))
    for _ in range(_POWER_STEPS):
        basis = matrix @ torch.linalg.qr(matrix.T @ torch.linalg.qr(basis)[0])[0]
    basis = torch.linalg.qr(basis)[0]
    u, s, v = torch.linalg.svd(basis.T @ matrix, full_matrices=False)
    return basis @ u[:, :rank] * s[:rank], v[:rank].contiguous()
