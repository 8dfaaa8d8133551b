"""The maths of gates against closed forms."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch

from mole_diffusion import functional as mole

MASKS = [torch.tensor([True, True, True]), torch.tensor([True, False, True]), torch.tensor([False, False, True])]


def test_nla() -> None:
    assert torch.equal(mole.nla_weights(4), torch.full((4,), 0.25))
    assert torch.equal(mole.nla_weights(3, torch.tensor([True, False, True])), torch.tensor([0.5, 0.0, 0.5]))
    assert not mole.nla_weights(2, torch.tensor([False, False])).any()


@pytest.mark.parametrize("mask", MASKS)
def test_masked_softmax_is_the_renormalised_softmax(mask: torch.Tensor) -> None:
    logits = torch.randn(2, 5, 3, generator=torch.Generator().manual_seed(0)) * 4
    masked = mole.softmax_gate(logits, 0.7, mask)
    torch.testing.assert_close(masked, mole.renormalise(mole.softmax_gate(logits, 0.7), mask))
    torch.testing.assert_close(masked.sum(-1), torch.ones(2, 5))
    assert not masked[..., ~mask].any()


@pytest.mark.parametrize("gate", [mole.softmax_gate, mole.sigmoid_gate])
def test_nothing_active_is_exactly_zero(gate: object) -> None:
    weights = gate(torch.randn(2, 3), 1.0, torch.zeros(3, dtype=torch.bool))  # type: ignore[operator]
    assert torch.equal(weights, torch.zeros(2, 3))


def test_renormalise_keeps_the_total() -> None:
    weights = torch.tensor([0.2, 0.3, 0.5])
    torch.testing.assert_close(
        mole.renormalise(weights, torch.tensor([True, False, True])), torch.tensor([0.2, 0.0, 0.5]) / 0.7
    )
    assert torch.equal(mole.renormalise(weights, torch.zeros(3, dtype=torch.bool)), torch.zeros(3))
    assert not mole.renormalise(torch.tensor([0.0, 1.0]), torch.tensor([True, False])).any()


def test_one_lora_minus_another_is_no_zero() -> None:
    weights = torch.tensor([1.0, -1.0, 0.0])
    assert torch.equal(mole.renormalise(weights, torch.ones(3, dtype=torch.bool)), weights)
    assert torch.equal(mole.renormalise(weights, torch.tensor([True, True, False])), weights)


def test_temperature_sharpens() -> None:
    logits = torch.tensor([1.0, 0.0])
    assert mole.softmax_gate(logits, 0.1)[0] > 0.999 and abs(mole.softmax_gate(logits, 100.0)[0] - 0.5) < 0.01


def test_null_starts_close_to_nla_and_can_leave_places_to_the_base() -> None:
    start = mole.null_gate(torch.zeros(2), torch.zeros(1))
    torch.testing.assert_close(start, torch.full((2,), 1 / (2 + math.exp(-3))))
    assert mole.null_gate(torch.zeros(2), torch.tensor([20.0])).sum() < 1e-6
    masked = mole.null_gate(torch.zeros(2), torch.zeros(1), 1.0, torch.tensor([True, False]))
    torch.testing.assert_close(masked, torch.tensor([1 / (1 + math.exp(-3)), 0.0]))


@pytest.mark.parametrize("count", [1, 2, 5])
def test_sigmoid_starts_at_nla(count: int) -> None:
    torch.testing.assert_close(mole.sigmoid_gate(torch.zeros(count)), torch.full((count,), min(1 / count, 0.99)))


@pytest.mark.parametrize("count", [2, 3, 7])
def test_balance_loss_at_uniform(count: int) -> None:
    """−log Π 1/N = N·log N, and nothing is lower."""
    uniform = mole.balance_loss(torch.full((4, count), 1 / count))
    torch.testing.assert_close(uniform, torch.tensor(count * math.log(count)))
    other = torch.rand(4, count, generator=torch.Generator().manual_seed(0)).softmax(-1)
    assert mole.balance_loss(other) > uniform


def test_balance_loss_sees_only_the_mean() -> None:
    """Exclusive gates that are uniform on average are as good as uniform gates."""
    exclusive = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    torch.testing.assert_close(mole.balance_loss(exclusive), torch.tensor(2 * math.log(2)))


def test_balance_loss_gradient_and_mask() -> None:
    logits = torch.tensor([[2.0, 0.0, 1.0]], requires_grad=True)
    mole.balance_loss(mole.softmax_gate(logits)).backward()
    assert logits.grad is not None
    torch.testing.assert_close(logits.grad, 3 * logits.detach().softmax(-1) - 1)
    masked = mole.balance_loss(torch.tensor([[0.5, 0.0, 0.5]]), torch.tensor([True, False, True]))
    torch.testing.assert_close(masked, torch.tensor(2 * math.log(2)))


def test_rank_expand() -> None:
    weights = torch.tensor([[0.1, 0.2, 0.7]])
    torch.testing.assert_close(mole.rank_expand(weights, (1, 3, 2)), torch.tensor([[0.1, 0.2, 0.2, 0.2, 0.7, 0.7]]))


def test_energy_is_the_norm_of_the_wide_product_and_free_of_the_basis() -> None:
    random = torch.Generator().manual_seed(0)
    a, b, x = (torch.randn(size, generator=random) for size in ((3, 8), (16, 3), (5, 8)))
    wide = 0.5 * x @ a.T @ b.T
    torch.testing.assert_close(mole.energy(x @ a.T, mole.gram(b, 0.5)), wide.square().sum(-1), rtol=1e-4, atol=1e-4)
    basis = torch.randn(3, 3, generator=random)
    torch.testing.assert_close(
        mole.energy(x @ (basis @ a).T, mole.gram(b @ basis.inverse(), 0.5)), wide.square().sum(-1), rtol=1e-3, atol=1e-3
    )


def test_trigger_spans() -> None:
    ids = torch.tensor([[9, 1, 2, 3, 1, 2], [9, 2, 1, 9, 9, 9]])
    spans = mole.trigger_spans(ids, [[1, 2], [3], [], [7] * 20])
    assert spans[0, :, 0].tolist() == [False, True, True, False, True, True]
    assert spans[0, :, 1].tolist() == [False, False, False, True, False, False]
    assert not spans[1].any() and not spans[..., 2:].any()


def test_maps_and_resampling() -> None:
    weights = torch.rand(2, 12, 3)
    maps = mole.to_maps(weights, (3, 4))
    assert torch.equal(maps[1, 2, 1, 3], weights[1, 7, 2])
    assert mole.resample(maps, (3, 4)) is maps
    constant = torch.full((1, 2, 5, 7), 0.3)
    for grid in ((2, 3), (10, 14), (5, 3), (3, 20)):
        torch.testing.assert_close(mole.resample(constant, grid), torch.full((1, 2, *grid), 0.3))
    assert mole.to_maps(weights[:, :1], (3, 4)).shape == (2, 3, 1, 1)


@pytest.mark.parametrize(
    ("places", "latent", "grid"),
    [(64, (8, 8), (8, 8)), (16, (8, 8), (4, 4)), (6, (5, 4), (3, 2)), (2, (8, 16), (1, 2)), (7, (8, 8), (1, 7))],
)
def test_token_grid(places: int, latent: tuple[int, int], grid: tuple[int, int]) -> None:
    assert mole.token_grid(places, latent) == grid


def test_timestep_features() -> None:
    features = mole.timestep_features(torch.tensor([0, 999]), 8)
    torch.testing.assert_close(features[0], torch.tensor([1.0] * 4 + [0.0] * 4))
    assert features.shape == (2, 8) and not torch.equal(features[0], features[1])


PRIOR = torch.tensor([1.0, 0.01, 0.3])


def sample_logits() -> torch.Tensor:
    return 2 * torch.randn(2, 5, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@pytest.mark.parametrize("mask", [None, *MASKS])
def test_a_prior_is_its_logarithm_added_to_the_logits(mask: torch.Tensor | None) -> None:
    logits, null, prior = sample_logits(), torch.tensor([0.4], dtype=torch.float64), PRIOR.double()
    for total, plain, moved in (
        ("share", mole.softmax_gate(logits, 1.0, mask), mole.softmax_gate(logits + prior.log(), 1.0, mask)),
        ("share", mole.null_gate(logits, null, 1.0, mask), mole.null_gate(logits + prior.log(), null, 1.0, mask)),
        ("odds", mole.sigmoid_gate(logits, 1.0, mask), mole.sigmoid_gate(logits + prior.log(), 1.0, mask)),
        ("free", logits, logits * prior),
    ):
        torch.testing.assert_close(mole.with_prior(plain, prior, total), moved)
        torch.testing.assert_close(mole.with_prior(plain, torch.ones(3, dtype=torch.float64), total), plain)


def test_a_prior_is_no_temperature() -> None:
    """τ divides the gate's own logits, not the region's."""
    logits = sample_logits()
    expected = (logits / 0.5 + PRIOR.double().log()).softmax(-1)
    torch.testing.assert_close(mole.with_prior(mole.softmax_gate(logits, 0.5), PRIOR.double()), expected)


@pytest.mark.parametrize("loss", [mole.balance_loss, mole.entropy_loss])
@pytest.mark.parametrize("mask", [None, torch.tensor([True, False, True, True])])
def test_the_gradient_of_the_balance_losses(loss: Callable[..., torch.Tensor], mask: torch.Tensor | None) -> None:
    """Against finite differences, through a gate; and nothing is lower than the uniform mean, where it vanishes."""
    random = torch.Generator().manual_seed(1)
    logits = torch.randn(6, 4, generator=random, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: loss(mole.softmax_gate(x, 0.7, mask), mask), logits, atol=1e-7)
    uniform = torch.zeros(6, 4, dtype=torch.float64, requires_grad=True)
    least = loss(mole.softmax_gate(uniform, 0.7, mask), mask)
    least.backward()
    assert uniform.grad is not None and float(uniform.grad.abs().max()) < 1e-9
    for _ in range(20):
        other = torch.randn(6, 4, generator=random, dtype=torch.float64)
        assert loss(mole.softmax_gate(other, 0.7, mask), mask) > least
    count = 4 if mask is None else 3
    at_uniform = count * math.log(count) if loss is mole.balance_loss else -math.log(count)
    assert float(least.detach()) == pytest.approx(at_uniform)


def test_the_entropy_is_bounded_where_the_balance_loss_is_not() -> None:
    lost = torch.tensor([[1.0, 0.0]])
    assert float(mole.entropy_loss(lost)) == 0.0 and float(mole.balance_loss(lost)) > 80
    exclusive = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    torch.testing.assert_close(mole.entropy_loss(exclusive), torch.tensor(-math.log(2)))


def test_router_logits_against_the_wide_product() -> None:
    random = torch.Generator().manual_seed(0)
    a, b, x = (torch.randn(size, generator=random) for size in ((5, 8), (16, 5), (2, 7, 8)))
    query, up = torch.randn(2, 7, 4, generator=random), torch.randn(16, 4, generator=random)
    owners = torch.tensor([0, 0, 2, 2, 2])
    found = mole.router_logits(query, x @ a.T, up.T @ b, owners, 3)
    for column in range(3):
        values = (x @ a[owners == column].T) @ b[:, owners == column].T
        torch.testing.assert_close(found[..., column], ((values @ up) * query).sum(-1) / 2.0, rtol=1e-4, atol=1e-4)
