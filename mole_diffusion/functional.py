"""Pure tensor maths of gates and composition; no modules, no state. Weights are (…, N) with N experts last.

Equation numbers are those of MoLE, arXiv 2404.13628.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

NULL_START = -3.0
_ALMOST_ONE = 0.99


def nla_weights(count: int, mask: Tensor | None = None) -> Tensor:
    """Normalised linear arithmetic (Eq. 2): 1/N for every active expert.

    Args:
        count: N.
        mask: (…, N) bool, True = active.

    Returns:
        (N,) fp32, or shaped like ``mask``; all zero where nothing is active.
    """
    weights = torch.full((count,), 1.0 / count if count else 0.0, device=None if mask is None else mask.device)
    return weights if mask is None else renormalise(weights, mask)


def renormalise(weights: Tensor, mask: Tensor) -> Tensor:
    """Switch experts off and give their weight to the others in proportion; the total stays what it was.

    Args:
        weights: (…, N).
        mask: bool, True = active; (N,), or any shape that broadcasts with the weights.

    Returns:
        (…, N). Active weights that sum to 0 (one LoRA minus another) have no proportion: they stay as they are.
    """
    kept = torch.where(mask, weights, torch.zeros_like(weights))
    total = kept.sum(-1, keepdim=True)
    share = weights.sum(-1, keepdim=True) / torch.where(total == 0, torch.ones_like(total), total)
    return kept * torch.where(total == 0, torch.ones_like(share), share)


def softmax_gate(logits: Tensor, tau: Tensor | float = 1.0, mask: Tensor | None = None) -> Tensor:
    """G = softmax(ε / τ) over the active experts (Eq. 11); the others get exactly 0.

    Args:
        logits: ε, (…, N).
        tau: temperature > 0, a number or a 0-d tensor.
        mask: bool, True = active, (N,) or broadcastable; None = all.

    Returns:
        (…, N); all zero where nothing is active. Equal to :func:`renormalise` of the unmasked gate.
    """
    scaled = logits / tau
    if mask is None:
        return scaled.softmax(-1)
    hidden = torch.where(mask, scaled, torch.finfo(scaled.dtype).min)
    return hidden.softmax(-1) * mask.to(scaled.dtype)


def null_gate(logits: Tensor, null: Tensor, tau: Tensor | float = 1.0, mask: Tensor | None = None) -> Tensor:
    """Softmax over the experts and one expert that does nothing, so that places may stay the base's.

    Args:
        logits: (…, N).
        null: (…, 1) or broadcastable: the null expert's logit, before ``NULL_START`` is added; at 0 the experts share
            1 − e⁻³ / (N + e⁻³) of the weight, close to NLA.
        tau, mask: as in :func:`softmax_gate`; the null expert is never masked.

    Returns:
        (…, N), the null expert's share left out.
    """
    null = (null + NULL_START).expand(*logits.shape[:-1], 1)
    if mask is not None:
        mask = F.pad(mask, (0, 1), value=True)
    return softmax_gate(torch.cat([logits, null], -1), tau, mask)[..., :-1]


def sigmoid_gate(logits: Tensor, tau: Tensor | float = 1.0, mask: Tensor | None = None) -> Tensor:
    """Independent weights in (0, 1), 1/N at logit 0 (0.99 for a single expert).

    Experts do not compete here, so a masked one leaves its share to nobody.
    """
    start = min(1.0 / logits.shape[-1], _ALMOST_ONE)
    weights = torch.sigmoid(logits / tau + math.log(start / (1.0 - start)))
    return weights if mask is None else weights * mask.to(weights.dtype)


def mean_gate(weights: Tensor, places: Tensor | None = None) -> Tensor:
    """Mean gate of one block.

    Args:
        weights: (B, L, N).
        places: (B, L) non-negative weights of the places that count; None = all alike.

    Returns:
        (N,).
    """
    if places is None:
        return weights.mean((0, 1))
    places = places.to(weights.dtype).unsqueeze(-1)
    return (weights * places).sum((0, 1)) / places.sum().clamp_min(torch.finfo(weights.dtype).tiny)


def balance_loss(weights: Tensor, mask: Tensor | None = None) -> Tensor:
    """L_balance = −log Π_i q_i with q the mean gate over the M gated blocks (Eq. 14-15), differentiable.

    The mean gate is normalised first, which changes nothing for a softmax gate and makes the loss meaningful for gates
    whose total is free. The minimum is N·log N, reached when the mean is uniform.

    Args:
        weights: (M, N) one mean gate per block.
        mask: (N,) bool; inactive experts are left out of the product.

    Returns:
        0-d tensor.
    """
    share = _shares(weights, mask)
    return -share.clamp_min(torch.finfo(share.dtype).tiny).log().sum()


def entropy_loss(weights: Tensor, mask: Tensor | None = None) -> Tensor:
    """The alternative to :func:`balance_loss`: Σ q_i·log q_i, the negative entropy of the normalised mean gate.

    Bounded, where L_balance grows without limit as an expert's share goes to 0. The minimum is −log N, at the uniform
    mean.

    Args:
        weights, mask: as in :func:`balance_loss`.

    Returns:
        0-d tensor.
    """
    share = _shares(weights, mask)
    return (share * share.clamp_min(torch.finfo(share.dtype).tiny).log()).sum()


def _shares(weights: Tensor, mask: Tensor | None) -> Tensor:
    """Mean gate (active experts,) over the blocks of (M, N), normalised to 1."""
    mean = weights.mean(0)
    if mask is not None:
        mean = mean[mask]
    tiny = torch.finfo(mean.dtype).tiny
    return mean / mean.sum().clamp_min(tiny)


def with_prior(weights: Tensor, prior: Tensor, total: str = "share") -> Tensor:
    """A prior on places, such as a region that the user drew.

    ``share``: w_i·p_i / (Σ_j w_j·p_j + 1 − Σ_j w_j), which is log p_i added to the logits of a softmax gate, with a
    null expert or without. ``odds``: the same for each expert's own sigmoid. ``free``: w_i·p_i.

    Args:
        weights: (…, N), before any gain.
        prior: broadcasts with the weights, above 0 for "share".
        total: "share", "odds" or "free".

    Returns:
        (…, N).
    """
    product = weights * prior
    if total == "free":
        return product
    if total == "odds":
        return product / (product + 1.0 - weights)
    whole = weights.sum(-1, keepdim=True)
    spare = (1.0 - whole).clamp_min(0.0)  # the null expert's share
    kept = product.sum(-1, keepdim=True) + spare
    return product * ((whole + spare) / torch.where(kept > 0, kept, torch.ones_like(kept)))


def rank_expand(weights: Tensor, ranks: Sequence[int]) -> Tensor:
    """One weight per expert → one weight per row of the stacked A.

    Args:
        weights: (…, N).
        ranks: r_1 … r_N.

    Returns:
        (…, Σ r_i).
    """
    repeats = torch.tensor(list(ranks), device=weights.device)
    return weights.repeat_interleave(repeats, dim=-1, output_size=int(sum(ranks)))


def gram(b: Tensor, scale: float = 1.0) -> Tensor:
    """(s·B)ᵀ(s·B), (r, r): gives ‖s·B·u‖² = uᵀ·gram·u without building the wide product.

    Args:
        b: (d_out, r).
    """
    wide = scale * b.float()
    return wide.T @ wide


def energy(down: Tensor, grams: Tensor) -> Tensor:
    """‖s·B·A·x‖² of one expert from its A·x: independent of the basis that the LoRA happens to use.

    Args:
        down: A·x, (…, r).
        grams: (r, r) from :func:`gram`.

    Returns:
        (…).
    """
    return torch.einsum("...i,ij,...j->...", down.float(), grams, down.float())


def router_logits(query: Tensor, down: Tensor, keys: Tensor, owners: Tensor, count: int) -> Tensor:
    """RouterLoRA's scores ⟨A_r·x, B_rᵀ·v_i⟩ / √r_r with v_i = s_i·B_i·A_i·x (arXiv 2406.16989), without building v_i.

    Args:
        query: A_r·x, (…, r_r).
        down: the experts' A·x, (…, R).
        keys: B_rᵀ·[s_1·B_1 … s_n·B_n], (r_r, R).
        owners: (R,) long, the column of each rank.
        count: columns.

    Returns:
        (…, count) fp32; 0 for columns without a rank here.
    """
    scores = (query.float() @ keys.float()) * down.float() / math.sqrt(keys.shape[0])
    return scores.new_zeros(*scores.shape[:-1], count).index_add(-1, owners, scores)


def trigger_spans(ids: Tensor, triggers: Sequence[Sequence[int]]) -> Tensor:
    """Where each expert's trigger stands in each prompt.

    Args:
        ids: (B, T) token ids.
        triggers: N token id sequences without special tokens; an empty one is found nowhere.

    Returns:
        (B, T, N) bool, True on every token of every occurrence.
    """
    rows, length = ids.shape
    spans = torch.zeros(rows, length, len(triggers), dtype=torch.bool, device=ids.device)
    for expert, trigger in enumerate(triggers):
        size = len(trigger)
        if not 0 < size <= length:
            continue
        wanted = torch.tensor(list(trigger), device=ids.device, dtype=ids.dtype)
        starts = (ids.unfold(1, size, 1) == wanted).all(-1)
        for offset in range(size):
            spans[:, offset : offset + starts.shape[1], expert] |= starts
    return spans


def timestep_features(timesteps: Tensor, width: int = 64) -> Tensor:
    """Sinusoidal features of diffusion timesteps.

    Args:
        timesteps: (B,).
        width: even.

    Returns:
        (B, width) fp32.
    """
    half = width // 2
    frequencies = torch.exp(-math.log(10_000.0) * torch.arange(half, device=timesteps.device) / half)
    angles = timesteps.float().unsqueeze(-1) * frequencies
    return torch.cat([angles.cos(), angles.sin()], -1)


def to_maps(weights: Tensor, grid: tuple[int, int]) -> Tensor:
    """(B, H·W, N) → (B, N, H, W); (B, 1, N) → (B, N, 1, 1)."""
    rows, places, count = weights.shape
    height, width = (1, 1) if places == 1 else grid
    return weights.transpose(1, 2).reshape(rows, count, height, width)


def resample(maps: Tensor, grid: tuple[int, int]) -> Tensor:
    """Gate maps on another grid: area mean where it shrinks, nearest where it grows; constants stay constant.

    Args:
        maps: (B, N, H, W).

    Returns:
        (B, N, *grid), or ``maps`` itself where it already fits or is a single place.
    """
    if tuple(maps.shape[-2:]) in (grid, (1, 1)):
        return maps
    if maps.shape[-2] >= grid[0] and maps.shape[-1] >= grid[1]:
        return F.adaptive_avg_pool2d(maps, grid)
    return F.interpolate(maps, size=grid, mode="nearest")


def token_grid(places: int, latent: tuple[int, int]) -> tuple[int, int]:
    """Height and width of ``places`` image tokens that came from a latent grid by halving (rounding up)."""
    height, width = latent
    while height * width > places and (height > 1 or width > 1):
        height, width = math.ceil(height / 2), math.ceil(width / 2)
    return (height, width) if height * width == places else (1, places)
