"""LyCORIS's products against their own definitions, computed in full."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import save

from mole_diffusion.errors import InvalidFile
from mole_diffusion.experts import Expert, inspect_file
from mole_diffusion.experts.formats.lycoris import MAX_EXACT

LAYER, CONV = "lora_unet_mid_block_attentions_0_proj_out", "lora_unet_conv_in"
NAMES = {LAYER: "unet.mid_block.attentions.0.proj_out", CONV: "unet.conv_in"}
Tensors = dict[str, torch.Tensor]


def r(*shape: int) -> torch.Tensor:
    return torch.randn(*shape)


def tucker(t: torch.Tensor, wb: torch.Tensor, wa: torch.Tensor) -> torch.Tensor:
    return torch.einsum("ijkl,jr,ip->prkl", t, wb, wa).contiguous()


def locon() -> tuple[str, Tensors, torch.Tensor, float]:
    up, mid, down = r(6, 4, 1, 1), r(4, 4, 3, 3), r(4, 8, 1, 1)
    whole = torch.einsum("oi,ijkl,jc->ockl", up[..., 0, 0], mid, down[..., 0, 0])
    return CONV, {"lora_up.weight": up, "lora_mid.weight": mid, "lora_down.weight": down}, whole, 4


def loha_linear() -> tuple[str, Tensors, torch.Tensor, float]:
    a1, b1, a2, b2 = r(6, 3), r(3, 8), r(6, 3), r(3, 8)
    return LAYER, {"hada_w1_a": a1, "hada_w1_b": b1, "hada_w2_a": a2, "hada_w2_b": b2}, (a1 @ b1) * (a2 @ b2), 3


def loha_flat_conv() -> tuple[str, Tensors, torch.Tensor, float]:
    a1, b1, a2, b2 = r(6, 3), r(3, 72), r(6, 3), r(3, 72)
    whole = ((a1 @ b1) * (a2 @ b2)).reshape(6, 8, 3, 3)
    return CONV, {"hada_w1_a": a1, "hada_w1_b": b1, "hada_w2_a": a2, "hada_w2_b": b2}, whole, 3


def loha_tucker() -> tuple[str, Tensors, torch.Tensor, float]:
    t1, a1, b1, t2, a2, b2 = r(2, 2, 3, 3), r(2, 6), r(2, 8), r(2, 2, 3, 3), r(2, 6), r(2, 8)
    parts = {"hada_t1": t1, "hada_w1_a": a1, "hada_w1_b": b1, "hada_t2": t2, "hada_w2_a": a2, "hada_w2_b": b2}
    return CONV, parts, tucker(t1, b1, a1) * tucker(t2, b2, a2), 2


def lokr_half() -> tuple[str, Tensors, torch.Tensor, float]:
    w1, a2, b2 = r(2, 4), r(3, 2), r(2, 5)
    return LAYER, {"lokr_w1": w1, "lokr_w2_a": a2, "lokr_w2_b": b2}, torch.kron(w1, a2 @ b2), 2


def lokr_split() -> tuple[str, Tensors, torch.Tensor, float]:
    a1, b1, w2 = r(4, 2), r(2, 3), r(3, 5)
    return LAYER, {"lokr_w1_a": a1, "lokr_w1_b": b1, "lokr_w2": w2}, torch.kron(a1 @ b1, w2), 2


def lokr_conv() -> tuple[str, Tensors, torch.Tensor, float]:
    w1, t2, a2, b2 = r(2, 4), r(2, 2, 3, 3), r(2, 3), r(2, 5)
    whole = torch.kron(w1[..., None, None], tucker(t2, b2, a2))
    return CONV, {"lokr_w1": w1, "lokr_t2": t2, "lokr_w2_a": a2, "lokr_w2_b": b2}, whole, 2


def lokr_full() -> tuple[str, Tensors, torch.Tensor, float]:
    """Without a factor of its own rank, LyCORIS ignores α."""
    w1, w2 = r(2, 4), r(3, 5, 3, 3)
    return CONV, {"lokr_w1": w1, "lokr_w2": w2}, torch.kron(w1[..., None, None], w2), 0


def full() -> tuple[str, Tensors, torch.Tensor, float]:
    whole = r(6, 8, 3, 3)
    return CONV, {"diff": whole}, whole, 0


CASES = (locon, loha_linear, loha_flat_conv, loha_tucker, lokr_half, lokr_split, lokr_conv, lokr_full, full)


@pytest.mark.parametrize("alpha", [None, 1.5])
@pytest.mark.parametrize("case", CASES)
def test_a_small_product_is_exact(case, alpha: float | None) -> None:
    torch.manual_seed(0)
    prefix, parts, whole, rank = case()
    tensors = {f"{prefix}.{part}": tensor for part, tensor in parts.items()}
    if alpha is not None:
        tensors[f"{prefix}.alpha"] = torch.tensor(alpha)
    pair = Expert.load(save(tensors)).modules[NAMES[prefix]].reshaped(tuple(whole.shape))
    assert pair is not None
    expected = whole * (alpha / rank if alpha and rank else 1.0)
    torch.testing.assert_close(pair.delta(), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("scale", [1.0, 1e18])
def test_a_large_product_becomes_its_nearest_pair_and_says_how_near(scale: float) -> None:
    torch.manual_seed(0)
    wide = scale * r(300, 20) @ r(20, 400)
    noisy = wide + 0.02 * wide.std() * r(300, 400)
    data = save({f"{LAYER}.diff": noisy})
    pair = Expert.load(data).modules[NAMES[LAYER]]
    off = float((pair.delta() - noisy).double().norm() / noisy.double().norm())
    assert pair.rank == MAX_EXACT and 0 < off < 0.02
    seen = inspect_file(data)
    assert seen.ok and seen.approximated == 1 and seen.error == pytest.approx(off, abs=1e-4)
    assert f"1 of 1 modules as their nearest pair, up to {off:.1%} off" in seen.sentence()
    torch.testing.assert_close(Expert.load(data).modules[NAMES[LAYER]].a, pair.a, rtol=0, atol=0)


def test_what_is_not_low_rank_is_refused_with_its_error() -> None:
    torch.manual_seed(0)
    with pytest.raises(InvalidFile, match=r"not low-rank: its nearest pair of rank 256 is \d+ % off"):
        Expert.load(save({f"{LAYER}.diff": r(700, 700)}))


@pytest.mark.parametrize(
    ("parts", "part"),
    [
        (
            {"hada_w1_a": (6, 3), "hada_w1_b": (3, 8), "hada_w2_a": (6, 3), "hada_w2_b": (3, 9)},
            "do not belong together",
        ),
        ({"hada_w1_a": (6, 3), "hada_w1_b": (3, 8), "hada_w2_a": (6, 3)}, "not understood"),
        ({"lokr_w1": (2, 2)}, "not understood"),
        ({"lokr_w1": (2, 2), "lokr_w2_a": (3, 2), "lokr_w2_b": (4, 5)}, "do not belong together"),
        ({"lora_mid.weight": (4, 4, 3, 3), "lora_down.weight": (4, 8, 1, 1)}, "not understood"),
        ({"diff": (6,)}, "do not belong together"),
        ({"diff": (6, 8), "diff_b": (6,)}, "biases"),
        ({"lokr_w1": (3000, 1), "lokr_w2": (3000, 1000)}, "would grow"),
        (
            {"hada_w1_a": (1, 999), "hada_w1_b": (999, 600), "hada_w2_a": (1, 999), "hada_w2_b": (999, 600)},
            "would grow",
        ),
        (
            {"lora_mid.weight": (40000, 1, 1, 1), "lora_down.weight": (1, 9000, 1, 1), "lora_up.weight": (2, 1, 1, 1)},
            "would grow",
        ),
        ({"hada_w1_a": (6, 2), "hada_w1_b": (3, 8), "hada_w2_a": (6, 3), "hada_w2_b": (2, 8)}, "belong together"),
        ({"lora_up.weight": (6, 2), "lora_down.weight": (2, 8), "diff": (6, 8)}, "not understood"),
        ({"lokr_w1": (2, 2), "lokr_w2": (3, 4), "lokr_t2": (2, 2, 3, 3)}, "not understood"),
    ],
)
def test_damaged_products_are_refused(parts: dict[str, tuple[int, ...]], part: str) -> None:
    with pytest.raises(InvalidFile, match=part):
        Expert.load(save({f"{LAYER}.{name}": torch.ones(shape) for name, shape in parts.items()}))


def test_products_that_overflow_are_refused() -> None:
    parts = {"hada_w1_a": r(6, 3), "hada_w1_b": r(3, 8), "hada_w2_a": r(6, 3), "hada_w2_b": r(3, 8)}
    with pytest.raises(InvalidFile, match="infinity"):
        Expert.load(save({f"{LAYER}.{name}": 1e20 * tensor for name, tensor in parts.items()}))


def test_loading_leaves_the_random_state_alone() -> None:
    data = save({f"{LAYER}.diff": r(300, 20) @ r(20, 300)})
    state = torch.get_rng_state()
    Expert.load(data)
    assert torch.equal(torch.get_rng_state(), state)
