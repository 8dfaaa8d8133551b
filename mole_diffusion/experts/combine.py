"""Several experts melted into one ordinary LoRA, by the merging functions of PEFT."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from mole_diffusion.errors import BaseMismatch, InvalidRequest
from mole_diffusion.experts.canonical import MAX_RANK, Embeddings, Expert, LowRank, Role

Method = Literal[
    "cat", "linear", "svd", "ties", "ties_svd", "dare_linear", "dare_linear_svd", "dare_ties", "dare_ties_svd",
    "magnitude_prune", "magnitude_prune_svd",
]  # fmt: skip
COMBINE_METHODS: tuple[Method, ...] = (
    "cat", "linear", "svd", "ties", "ties_svd", "dare_linear", "dare_linear_svd", "dare_ties", "dare_ties_svd",
    "magnitude_prune", "magnitude_prune_svd",
)  # fmt: skip
_SVD = "_svd"
Weighted = Sequence[tuple[float, LowRank]]


def combine(
    experts: Sequence[Expert],
    weights: Sequence[float] | None = None,
    method: Method = "cat",
    *,
    density: float = 0.5,
    rank: int | None = None,
    seed: int = 0,
    sign: Literal["total", "frequency"] = "total",
    name: str | None = None,
) -> Expert:
    """One expert from several, as PEFT's ``add_weighted_adapter`` combines adapters.

    A module is combined from the experts that have it. With ΔW_i = s_i·B_i·A_i:

    | method | result |
    |---|---|
    | cat | Σ w_i ΔW_i exactly, rank Σ r_i |
    | svd | the best approximation of Σ w_i ΔW_i of the given rank |
    | linear | (Σ c_i·B_i)(Σ ±c_i·A_i), ±c_i² = w_i·s_i: rough, factors of different experts get multiplied |
    | magnitude_prune | linear, of each factor's largest values only |
    | ties | of the largest values those whose sign is the majority's, averaged (arXiv 2306.01708) |
    | dare_linear | linear, of randomly kept values divided by the density (arXiv 2311.03099) |
    | dare_ties | dare_linear with the majority's sign |
    | <one of these>_svd | the same on ΔW_i instead of the factors, then cut to the given rank |

    The last group decomposes every whole matrix, seconds for each large one; svd itself only the stacked factors.
    Factors of different ranks are pruned at their own size and filled up with zeros, where PEFT refuses them.

    Args:
        experts: at least one, on modules of the same shapes.
        weights: one finite number per expert; default 1 each.
        density: share of values that pruning keeps, above 0 and at most 1.
        rank: of the svd methods; default: the highest rank of all experts. Never more than a module's own.
        seed: of the random pruning; the global generator is left as it was.
        sign: ties: majority by "total" value or by "frequency".
        name: of the result; default: the names joined by "+".

    Returns:
        An expert in fp32 on the CPU with scale 1, without trigger, with the tokens of all.

    Raises:
        InvalidRequest: an argument is out of range, an expert is DoRA, or a token means two different things.
        BaseMismatch: a module has two shapes.
    """
    factors = _checked(experts, weights, method, density, rank, sign)
    modules: dict[str, list[tuple[float, LowRank]]] = {}
    for weight, expert in zip(factors, experts, strict=True):
        for key, pair in expert.modules.items():
            modules.setdefault(key, []).append((weight, _same_shape(key, pair, modules.get(key), expert.name)))
    top = rank or max(pair.rank for expert in experts for pair in expert.modules.values())
    merge = _merger(method, density, sign)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        made = {key: _module(key, found, method, merge, top) for key, found in modules.items()}
    bases = {expert.base for expert in experts}
    roles: set[Role] = {expert.role for expert in experts}
    return Expert(
        name or "+".join(expert.name for expert in experts),
        made,
        base=bases.pop() if len(bases) == 1 else None,
        role=roles.pop() if len(roles) == 1 else "subject",
        embeddings=shared_embeddings(experts),
    )


def _checked(
    experts: Sequence[Expert], weights: Sequence[float] | None, method: str, density: float, rank: int | None, sign: str
) -> list[float]:
    if not experts:
        raise InvalidRequest("Combining needs at least one expert, got none.")
    if method not in COMBINE_METHODS:
        raise InvalidRequest(f"Expected a method of {', '.join(COMBINE_METHODS)}, got {method!r}.")
    factors = [1.0] * len(experts) if weights is None else [float(weight) for weight in weights]
    if len(factors) != len(experts) or not all(map(math.isfinite, factors)):
        raise InvalidRequest(f"Expected one finite weight for each of {len(experts)} experts, got {weights!r}.")
    if not 0 < density <= 1:
        raise InvalidRequest(f"The density must be above 0 and at most 1, got {density!r}.")
    if rank is not None and not (method.endswith("svd") and 0 < rank <= MAX_RANK):
        raise InvalidRequest(f"A rank between 1 and {MAX_RANK} goes with the svd methods, got {rank!r} with {method}.")
    if sign not in ("total", "frequency"):
        raise InvalidRequest(f"The sign's majority is by total or by frequency, got {sign!r}.")
    dora = next((expert for expert in experts if expert.dora), None)
    if dora is not None:
        raise InvalidRequest(
            f"{dora.name!r} is DoRA: its change depends on the base's own weights and is no low-rank pair, so it "
            "cannot be combined into one LoRA. Compose it beside the others instead."
        )
    return factors


def _same_shape(key: str, pair: LowRank, earlier: Weighted | None, name: str) -> LowRank:
    shape = earlier[0][1].weight_shape if earlier else pair.weight_shape
    fitted = pair.reshaped(shape)
    if fitted is None:
        raise BaseMismatch(
            f"{key} is {shape} in one expert and {pair.weight_shape} in {name!r}: they were made for different bases."
        )
    return fitted


def _module(key: str, found: Weighted, method: str, merge: Callable[..., Tensor], rank: int) -> LowRank:
    plain = [(weight * pair.scale, _cpu(pair.a), _cpu(pair.b)) for weight, pair in found]
    if method == "cat":
        a, b = torch.cat([factor * a for factor, a, _ in plain]), torch.cat([b for *_, b in plain], 1)
        if a.shape[0] > MAX_RANK:
            raise InvalidRequest(
                f"{key} would have the rank {a.shape[0]}, more than {MAX_RANK}: choose the method svd with a rank."
            )
        return LowRank(a, b)
    if method == "svd":  # of the stacked factors: exact, and as cheap as they are small
        wide = torch.cat([b for *_, b in plain], 1), torch.cat([factor * a for factor, a, _ in plain])
        return _cut_product(*wide, rank)
    if method.endswith(_SVD):
        merged = merge([pair.delta().cpu() for _, pair in found], torch.tensor([weight for weight, _ in found]))
        return _cut(merged, rank)
    roots = torch.tensor([abs(factor) ** 0.5 for factor, *_ in plain])
    signs = torch.tensor([1.0 if factor >= 0 else -1.0 for factor, *_ in plain])
    return LowRank(merge([a for _, a, _ in plain], roots * signs), merge([b for *_, b in plain], roots, axis=1))


def _merger(method: str, density: float, sign: Literal["total", "frequency"]) -> Callable[..., Tensor]:
    """tensors, weights → one tensor; ``axis`` is that of the ranks, where tensors of other ranks are filled up."""
    from peft.utils import merge_utils as peft

    recipe = method.removesuffix(_SVD)

    def merge(tensors: list[Tensor], weights: Tensor, axis: int = 0) -> Tensor:
        if density < 1 and recipe not in ("linear", "svd"):
            random = recipe.startswith("dare")
            how: Literal["random", "magnitude"] = "random" if random else "magnitude"
            tensors = [peft.prune(tensor, density, method=how, rescale=random) for tensor in tensors]
        wide = max(tensor.shape[axis] for tensor in tensors)
        tensors = [_filled(tensor, wide, axis) for tensor in tensors]
        if not recipe.endswith("ties"):
            return peft.task_arithmetic(tensors, weights)
        stacked = torch.stack(tensors)
        majority = peft.calculate_majority_sign_mask(stacked, method=sign)
        return peft.disjoint_merge(stacked * peft.reshape_weight_task_tensors(stacked, weights), majority)

    return merge


def _filled(tensor: Tensor, size: int, axis: int) -> Tensor:
    missing = size - tensor.shape[axis]
    return F.pad(tensor, [0, 0] * (tensor.ndim - 1 - axis) + [0, missing]) if missing else tensor


def _cut(delta: Tensor, rank: int) -> LowRank:
    u, s, v = torch.linalg.svd(delta.flatten(1), full_matrices=False)
    return LowRank(v[:rank].reshape(-1, *delta.shape[1:]), u[:, :rank] * s[:rank])


def _cut_product(b: Tensor, a: Tensor, rank: int) -> LowRank:
    """SVD of b·a through the QR decompositions of both, b·a = Q_b (R_b R_aᵀ) Q_aᵀ."""
    (q_b, r_b), (q_a, r_a) = torch.linalg.qr(b), torch.linalg.qr(a.flatten(1).T)
    u, s, v = torch.linalg.svd(r_b @ r_a.T, full_matrices=False)
    return LowRank((v[:rank] @ q_a.T).reshape(-1, *a.shape[1:]), q_b @ (u[:, :rank] * s[:rank]))


def shared_embeddings(experts: Sequence[Expert]) -> Embeddings:
    """The tokens of all experts.

    Raises:
        InvalidRequest: a token means different things.
    """
    merged: dict[str, Mapping[str, Tensor]] = {}
    for expert in experts:
        for token, parts in expert.embeddings.items():
            known = merged.setdefault(token, parts)
            same = known.keys() == parts.keys() and all(torch.equal(known[part], parts[part]) for part in parts)
            if not same:
                raise InvalidRequest(
                    f"The token {token!r} of {expert.name!r} means something else in another expert, so the two cannot "
                    "become one LoRA. Compose them instead."
                )
    return merged


def _cpu(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", torch.float32)
