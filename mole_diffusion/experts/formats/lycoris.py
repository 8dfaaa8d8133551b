"""LyCORIS's other products (arXiv 2309.14859, sections 3.2 to 3.4) as low-rank pairs.

| parts of a module | its ΔW | as a pair |
|---|---|---|
| lora_down, lora_mid, lora_up | up × mid × down, a Tucker decomposition (LoCon) | exact, same rank |
| hada_w1_a, w1_b, w2_a, w2_b, optional hada_t1, t2 | (w1_a w1_b) ∘ (w2_a w2_b) (LoHa) | exact at rank r1 r2 |
| lokr_w1 or w1_a, w1_b; lokr_w2 or w2_a, w2_b, optional t2 | w1 ⊗ w2 (LoKr) | exact at rank r1 r2 |
| diff | ΔW itself | exact up to ``MAX_EXACT`` rows or columns |

A pair of more than ``MAX_EXACT`` ranks becomes the nearest one of that rank, and the relative error is stated.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from mole_diffusion.errors import InvalidFile
from mole_diffusion.experts.canonical import LowRank
from mole_diffusion.experts.formats.pairs import Built, Parts, read_alpha

MAX_EXACT = 128
MAX_ERROR = 0.3
_MAX_NUMBERS = 2**27
_OVERSAMPLED, _POWER_STEPS = 32, 4

Pair = tuple[Tensor, Tensor]
"""(out, r) and (r, in…), scale not applied."""


def build_lycoris(module: str, parts: Parts) -> Built | None:
    """The pair of a module whose parts are those of the table above; None where a part is missing.

    Raises:
        InvalidFile: shapes that do not belong together, or a product that no pair of ``MAX_EXACT`` ranks comes near.
    """
    tensors = {name: tensor.float() for name, tensor in parts.tensors.items() if name != "alpha"}
    try:
        found = _product(tensors)
    except (RuntimeError, ValueError, IndexError) as error:
        shapes = ", ".join(f"{name} {tuple(tensor.shape)}" for name, tensor in tensors.items())
        raise InvalidFile(f"The weights of {module} do not belong together: {shapes}.") from error
    if found is None:
        return None
    (up, down), rank = found
    alpha = read_alpha(module, parts.tensors.get("alpha"))
    up, down, error = _limited(module, up, down)
    return Built(LowRank(down, up, alpha / rank if alpha and rank else 1.0), alpha or None, error)


def _product(t: Mapping[str, Tensor]) -> tuple[Pair, int] | None:
    """The pair of whichever product is complete, and the rank that α is divided by (0: α counts for nothing)."""
    names = t.keys()
    if {"up", "mid", "down"} <= names:
        return _locon(t)
    if {f"hada_w{n}_{side}" for n in "12" for side in "ab"} <= names:
        return _loha(t)
    if all(f"lokr_w{n}" in names or {f"lokr_w{n}_a", f"lokr_w{n}_b"} <= names for n in "12"):
        return _lokr(t)
    return (_halves(t["diff"]), 0) if "diff" in names else None


def _locon(t: Mapping[str, Tensor]) -> tuple[Pair, int]:
    up, mid, down = t["up"].flatten(1), t["mid"], t["down"].flatten(1)
    return (up, torch.einsum("ijkl,jc->ickl", mid, down)), down.shape[0]


def _loha(t: Mapping[str, Tensor]) -> tuple[Pair, int]:
    """(B1 A1) ∘ (B2 A2) = (B1 ⊙ B2)(A1 ⊙ A2): products of every column of B1 with every one of B2, rows of A alike."""
    (b1, a1), (b2, a2) = (_tucker(t, f"hada_w{n}_a", f"hada_w{n}_b", f"hada_t{n}") for n in (1, 2))
    if a1.shape[1:] != a2.shape[1:] or len(b1) != len(b2):
        raise ValueError
    _small_enough(len(b1) * len(a1) * len(a2))
    up = (b1[:, :, None] * b2[:, None, :]).flatten(1)
    return (up, (a1[:, None] * a2[None]).flatten(0, 1)), a1.shape[0]


def _lokr(t: Mapping[str, Tensor]) -> tuple[Pair, int]:
    """(B1 A1) ⊗ (B2 A2) = (B1 ⊗ B2)(A1 ⊗ A2); the scale's rank is that of a factor that has one, else scale 1."""
    split1, split2 = "lokr_w1_a" in t, "lokr_w2_a" in t
    b1, a1 = (t["lokr_w1_a"], t["lokr_w1_b"]) if split1 else _halves(t["lokr_w1"])
    b2, a2 = _tucker(t, "lokr_w2_a", "lokr_w2_b", "lokr_t2") if split2 else _halves(t["lokr_w2"])
    _small_enough(len(b1) * len(b2) * len(a1) * len(a2))
    _small_enough(a1.numel() * a2.numel())
    kernel = a2.shape[2:]
    down = torch.einsum("ai,bj->abij", a1, a2.flatten(1)).reshape(len(a1) * len(a2), -1)
    if kernel:
        down = down.reshape(len(down), a1.shape[1] * a2.shape[1], *kernel)
    rank = a2.shape[0] if split2 else a1.shape[0] if split1 else 0
    return (torch.kron(b1, b2), down), rank


def _tucker(t: Mapping[str, Tensor], up: str, down: str, core: str) -> Pair:
    """A pair whose convolution may be split once more: up is then (r, out), the core (r, r, k, k)."""
    if core not in t:
        return t[up], t[down]
    return t[up].T.contiguous(), torch.einsum("ijkl,jc->ickl", t[core], t[down]).contiguous()


def _halves(weight: Tensor) -> Pair:
    """A full weight (out, in…) as an exact pair with an identity on its smaller side."""
    if weight.ndim not in (2, 4):
        raise ValueError
    out, into = weight.shape[0], weight[0].numel()
    if out <= into:
        return torch.eye(out), weight
    return weight.flatten(1), torch.eye(into).reshape(into, *weight.shape[1:])


def _small_enough(numbers: int) -> None:
    if numbers > _MAX_NUMBERS:
        raise InvalidFile(f"A module of this file would grow to {numbers:,} numbers: refused.")


def _limited(module: str, up: Tensor, down: Tensor) -> tuple[Tensor, Tensor, float]:
    """The pair itself, or its nearest of ``MAX_EXACT`` ranks (Eckart-Young) with the relative Frobenius error."""
    if up.ndim != 2 or up.shape[1] != len(down):
        raise InvalidFile(f"The weights of {module} do not belong together.")
    if len(down) <= MAX_EXACT:
        return up, down, 0.0
    _small_enough(len(up) * down[0].numel())
    delta = up @ down.flatten(1)
    rank = min(MAX_EXACT, *delta.shape)
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(0)  # the same file gives the same expert
        u, s, v = torch.svd_lowrank(delta, min(rank + _OVERSAMPLED, *delta.shape), _POWER_STEPS)
    total = float(delta.square().sum())
    left = max(0.0, total - float(s[:rank].square().sum()))
    error = (left / total) ** 0.5 if total else 0.0
    if error > MAX_ERROR:
        raise InvalidFile(
            f"{module} is not low-rank: its nearest pair of rank {rank} is {100 * error:.0f} % off (at most "
            f"{100 * MAX_ERROR:.0f} % is accepted). Merge this file into a model instead."
        )
    return u[:, :rank] * s[:rank], v[:, :rank].T.reshape(rank, *down.shape[1:]), error
