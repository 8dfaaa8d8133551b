"""Composed layers against merged weights, with the gates given by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mole_diffusion.experts import LowRank
from mole_diffusion.functional import resample, to_maps
from mole_diffusion.layers import ComposedConv2d, ComposedLinear, ExpertBank, SharedDown, compose_layer
from mole_diffusion.layers.composed import merging_pays


class Fixed:
    """A weigher that always gives the same weights (B|1, L|1, columns)."""

    def __init__(self, given: Tensor | None, grid: tuple[int, int] = (1, 1)) -> None:
        self.given = given
        self.grid = grid

    def weights(self, layer: ComposedLinear | ComposedConv2d, x: Tensor) -> Tensor | None:
        if self.given is None:
            return None
        if isinstance(layer, ComposedLinear):
            return layer.bank.pick(self.given)
        return layer.bank.pick(resample(to_maps(self.given, self.grid), layer.grid(x)), axis=1)


def pairs(shape: tuple[int, ...], ranks: tuple[int, ...] = (1, 3, 2)) -> dict[int, LowRank]:
    random = torch.Generator().manual_seed(0)
    return {
        column: LowRank(
            torch.randn(rank, *shape[1:], generator=random), torch.randn(shape[0], rank, generator=random), 0.5 + column
        )
        for column, rank in enumerate(ranks)
    }


CONVOLUTIONS = {
    "plain": {"kernel_size": 3, "padding": 1},
    "stride 2": {"kernel_size": 3, "padding": 1, "stride": 2},
    "dilated": {"kernel_size": 3, "padding": 2, "dilation": 2},
    "1x1": {"kernel_size": 1},
    "reflect": {"kernel_size": 3, "padding": 1, "padding_mode": "reflect"},
    "same": {"kernel_size": 3, "padding": "same"},
    "asymmetric": {"kernel_size": (3, 1), "padding": (1, 0)},
}


def test_linear_mixed_ranks_against_the_sum() -> None:
    base, x = nn.Linear(6, 5), torch.randn(2, 7, 6)
    experts = pairs((5, 6))
    weights = torch.rand(2, 7, 3)
    layer = compose_layer(base, ExpertBank(experts, base.weight), Fixed(weights), "k")
    expected = base(x) + sum(weights[..., i : i + 1] * (x @ pair.delta().T) for i, pair in experts.items())
    torch.testing.assert_close(layer(x), expected, rtol=1e-5, atol=1e-5)


def test_experts_that_do_not_touch_the_module() -> None:
    base, x = nn.Linear(6, 5), torch.randn(2, 7, 6)
    experts = {1: pairs((5, 6))[1]}
    layer = compose_layer(base, ExpertBank(experts, base.weight), Fixed(torch.tensor([[[5.0, 0.5, 7.0]]])), "k")
    torch.testing.assert_close(layer(x), base(x) + 0.5 * (x @ experts[1].delta().T), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", CONVOLUTIONS)
def test_convolution_against_the_merged_weight(kind: str) -> None:
    settings: Any = CONVOLUTIONS[kind]
    base, x = nn.Conv2d(4, 6, **settings), torch.randn(2, 4, 8, 10)
    experts = pairs(tuple(base.weight.shape))
    weights = torch.tensor([[[0.2, 0.5, 0.3]]])
    layer = compose_layer(base, ExpertBank(experts, base.weight), Fixed(weights), "k")
    got = layer(x)
    with torch.no_grad():
        base.weight += sum(float(weights[0, 0, i]) * pair.delta() for i, pair in experts.items())
    torch.testing.assert_close(got, base(x), rtol=1e-4, atol=1e-4)


def test_stride_2_is_gated_on_the_grid_of_its_output() -> None:
    """Left half expert 0, right half expert 1, on the 8×8 input; the 4×4 output obeys the halves."""
    base, x = nn.Conv2d(4, 6, 3, stride=2, padding=1), torch.randn(1, 4, 8, 8)
    experts = pairs(tuple(base.weight.shape), (2, 2))
    maps = torch.zeros(1, 2, 8, 8)
    maps[:, 0, :, :4] = 1
    maps[:, 1, :, 4:] = 1
    weigher = Fixed(maps.flatten(2).transpose(1, 2), (8, 8))
    got = compose_layer(base, ExpertBank(experts, base.weight), weigher, "k")(x)
    for expert, half in ((0, slice(0, 2)), (1, slice(2, 4))):
        delta = nn.functional.conv2d(x, experts[expert].delta(), None, 2, 1)
        torch.testing.assert_close(got[..., half], (base(x) + delta)[..., half], rtol=1e-4, atol=1e-4)


def test_none_and_zero_are_the_base_bit_for_bit() -> None:
    for base, x in ((nn.Linear(6, 5), torch.randn(2, 7, 6)), (nn.Conv2d(4, 6, 3), torch.randn(1, 4, 8, 8))):
        bank = ExpertBank(pairs(tuple(base.weight.shape)), base.weight)
        assert torch.equal(compose_layer(base, bank, Fixed(None), "k")(x), base(x))
        assert torch.equal(compose_layer(base, bank, Fixed(torch.zeros(1, 1, 3)), "k")(x), base(x))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_with_fp32_gates(dtype: torch.dtype) -> None:
    base, x = nn.Linear(16, 8).to(dtype), torch.randn(2, 7, 16, dtype=dtype)
    experts = pairs((8, 16))
    layer = compose_layer(base, ExpertBank(experts, base.weight), Fixed(torch.full((1, 1, 3), 1 / 3)), "k")
    assert layer(x).dtype == dtype and layer.bank.a.dtype == dtype
    exact = base.float()(x.float()) + sum(x.float() @ pair.delta().T for pair in experts.values()) / 3
    torch.testing.assert_close(layer.to(dtype)(x).float(), exact, rtol=0.05, atol=0.1)


def test_attributes_of_the_base_show_through_and_nothing_is_added_to_its_state() -> None:
    base = nn.Linear(6, 5)
    layer = compose_layer(base, ExpertBank(pairs((5, 6)), base.weight), Fixed(None), "k")
    assert layer.in_features == 6 and layer.weight is base.weight and layer.bias is base.bias
    assert set(layer.state_dict()) == {"base.weight", "base.bias"}
    with pytest.raises(AttributeError):
        _ = layer.nothing_of_this_name


def test_bank_delta() -> None:
    experts = pairs((5, 6))
    base = torch.zeros(5, 6)
    bank = ExpertBank(experts, base)
    expected = 0.2 * experts[0].delta() + 0.8 * experts[2].delta()
    torch.testing.assert_close(bank.delta(torch.tensor([0.2, 0.0, 0.8]), base), expected)


@pytest.mark.parametrize("ranks", [(1, 3, 2), (2, 2, 2)])
@pytest.mark.parametrize("rows", [1, 2, 4])
def test_merged_rows_equal_two_products(rows: int, ranks: tuple[int, ...]) -> None:
    """Without a graph one vector of weights for many tokens is put into the weight; the numbers stay."""
    base, x = nn.Linear(6, 5), torch.randn(4, 500, 6)
    bank = ExpertBank(pairs((5, 6), ranks), base.weight)
    weights = torch.rand(rows, 1, 3)
    assert merging_pays(rows, 2000, sum(ranks), 6, 5)
    layer = compose_layer(base, bank, Fixed(weights), "k")
    with torch.no_grad():
        merged = layer(x)
    torch.testing.assert_close(merged, layer(x), rtol=1e-5, atol=1e-5)
    by_hand = [x[i] @ (base.weight + bank.delta(weights[i % rows, 0], base.weight)).mT + base.bias for i in range(4)]
    torch.testing.assert_close(merged, torch.stack(by_hand).detach(), rtol=1e-5, atol=1e-5)


def test_products_are_shared_by_modules_with_one_input_and_by_steps() -> None:
    bases = [nn.Linear(6, 5) for _ in range(3)]
    weights = torch.rand(1, 9, 3)
    banks = [ExpertBank(pairs((5, 6)), base.weight) for base in bases]
    layers = [compose_layer(base, bank, Fixed(weights), str(id(base))) for base, bank in zip(bases, banks, strict=True)]
    x = torch.randn(2, 9, 6)
    with torch.no_grad():
        alone = [layer(x) for layer in layers]
        shared = SharedDown(layers, keep=True)  # type: ignore[arg-type]
        first = [layer(x) for layer in layers]
        kept = shared._product
        again = [layer(x) for layer in layers]
        assert shared._product is kept
        torch.testing.assert_close(first, alone, rtol=1e-5, atol=1e-5)
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
        x.mul_(2.0)  # the same tensor with other numbers is another input
        torch.testing.assert_close(layers[0](x), layers[0].base(x) + 2 * (alone[0] - layers[0].base(x / 2)))


def test_channels_last_maps_are_tokens_of_their_rows() -> None:
    base, x = nn.Linear(6, 5), torch.randn(2, 2, 3, 6)
    layer = compose_layer(base, ExpertBank(pairs((5, 6)), base.weight), Fixed(torch.rand(2, 1, 3)), "k")
    torch.testing.assert_close(layer(x), layer(x.flatten(1, 2)).unflatten(1, (2, 3)))
