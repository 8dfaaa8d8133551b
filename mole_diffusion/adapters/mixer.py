"""The r×r mixer between a LoRA's two factors: how it starts, and how it disappears again."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from mole_diffusion.errors import InvalidRequest

FIXED = ("butterfly",)
"""Mixers that are not trained."""


def init_mixer(kind: str, rank: int) -> Tensor:
    """The first value of a mixer W ∈ R^{r×r} (arXiv 2406.11909), fp32, drawn from torch's CPU generator.

    ``kaiming``: uniform in ±1/√r, the paper's default. ``orthogonal``: a random orthogonal matrix. ``normal``: standard
    deviation 1/√r, which keeps the expected length of A·x. ``identity``: starts as LoRA. ``butterfly``: the fixed
    mixing of two subspaces, [[I, I], [I, I]].

    Raises:
        InvalidRequest: as :func:`check_mixer`.
    """
    check_mixer(kind, rank)
    return _INITS[kind](rank)


def check_mixer(kind: str, rank: int) -> None:
    """Can a mixer of this kind and rank be trained?

    Raises:
        InvalidRequest: an unknown kind, ``zero``, or a butterfly of odd rank.
    """
    if kind == "zero":
        raise InvalidRequest(
            "A mixer that starts at zero kills every gradient: B starts at zero too, so neither A, B nor the mixer "
            "would ever move. Choose kaiming or orthogonal."
        )
    if kind not in _INITS:
        raise InvalidRequest(f"Expected a mixer that starts as {', '.join(MIXER_INITS)}, got {kind!r}.")
    if kind == "butterfly" and rank % 2:
        raise InvalidRequest(f"A butterfly mixer halves the rank: expected an even rank, got {rank}.")


def fold_down(a: Tensor, mixer: Tensor) -> Tensor:
    """A' = W·A, exact at the same rank, fp32.

    Args:
        a: (r, d_in) or, of a convolution, (r, c_in, k, k).
        mixer: (r, r).
    """
    return (mixer.float() @ a.float().flatten(1)).reshape(a.shape)


def _kaiming(rank: int) -> Tensor:
    return nn.init.kaiming_uniform_(torch.empty(rank, rank), a=math.sqrt(5))


def _orthogonal(rank: int) -> Tensor:
    return nn.init.orthogonal_(torch.empty(rank, rank))


def _normal(rank: int) -> Tensor:
    return torch.randn(rank, rank) / math.sqrt(rank)


def _butterfly(rank: int) -> Tensor:
    return torch.eye(rank // 2).repeat(2, 2)


_INITS: dict[str, Callable[[int], Tensor]] = {
    "kaiming": _kaiming,
    "orthogonal": _orthogonal,
    "normal": _normal,
    "identity": torch.eye,
    "butterfly": _butterfly,
}
MIXER_INITS = tuple(_INITS)
