from __future__ import annotations

import pytest
import torch

from mole_diffusion.experts import Expert, LowRank, forecast_collisions

KEY = "unet.down_blocks.0.attentions.1.transformer_blocks.0.attn1.to_q"
CONV = "unet.up_blocks.1.resnets.0.conv1"


def expert(modules: dict[str, LowRank], name: str = "one") -> Expert:
    return Expert(name, modules)


def test_overlaps_equal_their_definition_on_whole_matrices() -> None:
    torch.manual_seed(0)
    one, two = (
        expert({
            KEY: LowRank(torch.randn(rank, 8), torch.randn(6, rank), scale),
            CONV: LowRank(torch.randn(rank - 1, 4, 3, 3), torch.randn(5, rank - 1)),
        })
        for rank, scale in ((3, 0.5), (4, 2.0))
    )  # fmt: skip
    found = forecast_collisions(one, two)
    blocks = {overlap.block: overlap for overlap in found.blocks}
    places = {KEY: "unet.down_blocks.0.attentions.1.transformer_blocks.0", CONV: "unet.up_blocks.1.resnets.0"}
    assert blocks.keys() == set(places.values())
    sums = torch.zeros(3)
    for key, block in places.items():
        a, b = (e.modules[key].delta().flatten(1) for e in (one, two))
        values = torch.stack([(a @ b.T).norm(), (a.T @ b).norm(), ((a @ a.T).norm() * (b @ b.T).norm()).sqrt()])
        sums += values
        assert blocks[block].reads == pytest.approx(float(values[0] / values[2]), rel=1e-5)
        assert blocks[block].writes == pytest.approx(float(values[1] / values[2]), rel=1e-5)
    assert found.whole.reads == pytest.approx(float(sums[0] / sums[2]), rel=1e-5)
    assert sum(overlap.share for overlap in found.blocks) == pytest.approx(1)
    assert forecast_collisions(two, one).whole.collision == pytest.approx(found.whole.collision)


def test_equal_experts_collide_fully_and_orthogonal_spaces_not_at_all() -> None:
    wide = expert({KEY: LowRank(torch.randn(3, 8), torch.randn(6, 3))})
    assert forecast_collisions(wide, wide).whole.collision == pytest.approx(1)
    read, write = torch.eye(8), torch.eye(6)
    same = expert({KEY: LowRank(read[:1], write[:, :1], -3.0)})
    apart = expert({KEY: LowRank(read[1:2], write[:, 1:2])})
    half = expert({KEY: LowRank(read[:1], write[:, 2:3])})
    assert forecast_collisions(same, same).whole.collision == pytest.approx(1)
    assert forecast_collisions(same, apart).whole.collision == 0
    whole = forecast_collisions(same, half).whole
    assert (whole.reads, whole.writes) == (pytest.approx(1), 0)


def test_what_shares_no_layer_is_said_so() -> None:
    one = expert({KEY: LowRank(torch.ones(1, 8), torch.ones(6, 1))})
    two = expert({CONV: LowRank(torch.ones(1, 4, 3, 3), torch.ones(5, 1))})
    found = forecast_collisions(one, two)
    assert found.blocks == () and found.whole.collision == 0
    assert found.sentence("two") == "Beside two: no layer in common."


def test_a_linear_layer_and_its_1x1_convolution_are_one_layer() -> None:
    one = expert({KEY: LowRank(torch.ones(1, 8), torch.ones(6, 1))})
    two = expert({KEY: LowRank(torch.ones(1, 8, 1, 1), torch.ones(6, 1))})
    assert forecast_collisions(one, two).whole.collision == pytest.approx(1)
