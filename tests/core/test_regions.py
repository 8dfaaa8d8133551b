"""Regions: a prior on places, exact against the definition, at any resolution."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mole_diffusion import Composition, GateConfig, RouterConfig, StaticWeights, compose
from mole_diffusion.composition import nla, weighted_sum
from mole_diffusion.errors import InvalidRequest
from mole_diffusion.regions import check_grid, region_maps
from tests.core.small import HOSTS, SD_TARGETS, make_expert, make_module, make_sd, randomise, run_model

LEFT, TOP = (0.0, 0.0, 0.5, 1.0), (0.0, 0.0, 1.0, 0.5)
GATES: dict[str, Any] = {
    "softmax": GateConfig(scope="token"),
    "null": GateConfig(scope="token", scale="null", gain=True),
    "sigmoid": GateConfig(scope="token", scale="sigmoid"),
    "sample": GateConfig(),
    "sum": weighted_sum([0.7, 1.2]),
    "nla": nla(2),
}


class Single(nn.Module):
    """One convolution, so that what the gate sees and says can be written down."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 6, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)


def composed(pipe: Any, gate: Any, targets: tuple[str, ...] = ("conv",)) -> Composition:
    experts = [make_expert(pipe, name, seed=seed, targets=targets) for seed, name in enumerate(("robot", "bunny"))]
    composition = compose(pipe, experts, gate=gate)
    randomise(composition)
    return composition


def prior(shape: tuple[int, int], floor: float) -> Tensor:
    """Robot left, bunny above; (H, W, 2) at a size that halves divide."""
    maps = torch.full((*shape, 2), floor)
    maps[:, : shape[1] // 2, 0] = 1.0
    maps[: shape[0] // 2, :, 1] = 1.0
    return maps


def defined(composition: Composition, x: Tensor, p: Tensor) -> Tensor:
    """(B or 1, H, W, 2): log p added to the experts' logits, whatever the scale."""
    config = composition.config
    if isinstance(config, StaticWeights):
        weights = torch.tensor(config.weights).expand(1, *p.shape)
        logits = weights.log() + p.log()
        return logits.exp() if not config.redistribute else logits.softmax(-1)
    assert isinstance(config, GateConfig)
    gate: Any = composition.gate.blocks["all"]  # type: ignore[index]
    tokens = x.flatten(2).mT
    logits = gate.logits(tokens, None, None, config.scope == "sample") / gate.log_tau.exp()
    logits = logits.expand(-1, tokens.shape[1], -1).unflatten(1, x.shape[2:]).clone()
    if config.scale == "null":
        logits[..., -1] -= 3.0 / gate.log_tau.exp()
    logits[..., :2] += p.log()
    weights = logits.sigmoid() if config.scale == "sigmoid" else logits.softmax(-1)[..., :2]
    return weights if gate.gain is None else weights * gate.gain


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("as_mask", [False, True])
@torch.no_grad()
def test_log_of_the_region_is_added_to_the_logits(gate: str, as_mask: bool) -> None:
    torch.manual_seed(0)
    model, x = Single(), torch.randn(2, 4, 8, 12)
    composition = composed(model, GATES[gate])
    p = prior((8, 12), 0.05)
    regions: dict[str, Any] = {"robot": LEFT, "bunny": TOP}
    if as_mask:
        regions = {name: (p[..., place] == 1).float() for place, name in enumerate(regions)}
    deltas = [F.conv2d(x, expert.modules["module.conv"].delta(), padding=1) for expert in composition.experts]
    weights = defined(composition, x, p).movedim(-1, 0).unsqueeze(2)
    expected = model(x) + sum(weight * delta for weight, delta in zip(weights, deltas, strict=True))
    with composition:
        composition.place(regions, floor=0.05)
        torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_a_plain_sum_can_be_cut_to_its_region() -> None:
    torch.manual_seed(0)
    model, x = Single(), torch.randn(1, 4, 8, 8)
    before = model(x)
    composition = composed(model, weighted_sum(2))
    with composition:
        composition.mask("bunny")
        everywhere = model(x)
        composition.place({"robot": LEFT}, floor=0.0)
        cut = model(x)
    torch.testing.assert_close(cut[..., :4], everywhere[..., :4])
    assert torch.equal(cut[..., 4:], before[..., 4:]) and not torch.allclose(cut[..., :4], before[..., :4])


@pytest.mark.parametrize(
    ("host", "gate"),
    [*(("sd", gate) for gate in ("softmax", "null", "sample", "nla", "router")), ("sdxl", "softmax"),
     *((host, gate) for host in ("pixart", "sd3", "module") for gate in ("softmax", "null", "router"))],
)  # fmt: skip
@torch.no_grad()
def test_everywhere_is_no_region_and_alike_is_no_difference(host: str, gate: str) -> None:
    """Softmax weights do not change where the region is the same for every expert, at any size."""
    pipe = HOSTS[host]()
    targets = (*SD_TARGETS, "conv1", "time_emb_proj", "proj_in", "conv") if host != "module" else ("conv",)
    composition = composed(pipe, GATES.get(gate) or RouterConfig(rank=3), targets)
    prompts = None if host == "module" else ["a robot", "a bunny"]
    with composition:
        for size in ((8, 8), (12, 10)):
            composition.condition(prompts, guidance=False)
            composition.place(None)
            free = run_model(pipe, size=size)
            composition.place({"robot": (0, 0, 1, 1), "bunny": torch.ones(5, 7, dtype=torch.bool)})
            torch.testing.assert_close(run_model(pipe, size=size), free, rtol=1e-4, atol=1e-5)
            composition.place({"robot": LEFT, "bunny": LEFT})
            alike = run_model(pipe, size=size)
            if gate != "null":
                torch.testing.assert_close(alike, free, rtol=1e-3, atol=5e-4)
            composition.place({"robot": LEFT, "bunny": TOP})
            assert not torch.allclose(run_model(pipe, size=size), free, atol=2e-3)
            composition.mask("bunny")
            only = run_model(pipe, size=size)
            composition.place(None)
            if gate != "null":  # nobody else takes a weight, wherever it belongs
                torch.testing.assert_close(only, run_model(pipe, size=size), rtol=1e-3, atol=5e-4)
            composition.unmask()


@pytest.mark.parametrize("size", [(2, 2), (8, 8), (64, 48), (256, 256), (512, 512), (1024, 640)])
def test_boxes_and_masks_are_the_same_map(size: tuple[int, int]) -> None:
    mask = torch.zeros(size)
    mask[: size[0] // 2, size[1] // 2 :] = 1.0
    maps = region_maps([(0.5, 0.0, 1.0, 0.5), mask, None], 0.1)
    assert maps.shape[:2] == (1, 3) and torch.equal(maps[:, 0], maps[:, 1])
    assert float(maps.min()) == pytest.approx(0.1) and bool((maps[:, 2] == 1).all())


@pytest.mark.parametrize("grid", [(8, 8), (12, 10), (5, 7), (16, 9), (64, 96)])
def test_a_cell_has_the_share_that_the_box_covers(grid: tuple[int, int]) -> None:
    left, top, right, bottom = box = (0.11, 0.2, 0.73, 0.9)
    got = F.adaptive_avg_pool2d(region_maps([box], 0.0), grid)[0, 0]

    def share(low: float, high: float, count: int) -> Tensor:
        edges = torch.arange(count + 1) / count
        return ((edges[1:].clamp(max=high) - edges[:-1].clamp(min=low)) * count).clamp(0, 1)

    expected = share(top, bottom, grid[0])[:, None] * share(left, right, grid[1])
    assert float((got - expected).abs().max()) < 0.15
    torch.testing.assert_close(got.mean(), torch.tensor((right - left) * (bottom - top)), rtol=0.03, atol=0)


@pytest.mark.parametrize(
    ("region", "part"),
    [
        ((0.5, 0.0, 0.5, 1.0), "left < right"),
        ((0.0, 0.9, 1.0, 0.1), "top < bottom"),
        ((-0.1, 0.0, 1.0, 1.0), "0 ≤ left"),
        ((0.0, 0.0, 512.0, 512.0), "≤ 1"),
        ((0.0, 0.0, float("nan"), 1.0), "≤ 1"),
        ((0.0, 1.0, 1.0), "a box"),
        ("left", "a box"),
        (7, "a box"),
        (torch.ones(1, 8, 8), "must be"),
        (torch.zeros(0, 8), "must be"),
        (torch.full((8, 8), 255.0), "from 0 to 1"),
        (torch.full((8, 8), float("nan")), "from 0 to 1"),
    ],
)
def test_malformed_regions(region: Any, part: str) -> None:
    with pytest.raises(InvalidRequest, match=part):
        composed(make_module(), nla(2)).place({"robot": region})


def test_what_cannot_be_placed_is_refused() -> None:
    pipe = make_sd()
    composition = composed(pipe, nla(2), SD_TARGETS)
    with pytest.raises(InvalidRequest, match="No expert is named 'cat'"):
        composition.place({"cat": LEFT})
    for floor in (0.0, 1.0, -0.1, float("nan")):
        with pytest.raises(InvalidRequest, match="floor"):
            composition.place({"robot": LEFT}, floor=floor)
    outside = compose(pipe, composition.experts, gate=nla(1), outside=["bunny"])
    with pytest.raises(InvalidRequest, match="outside the gate"):
        outside.place({"bunny": LEFT})
    with composition:
        composition.place({"robot": LEFT})
        with pytest.raises(InvalidRequest, match="Regions"):
            composition.merge()
        composition.place(None)
        composition.merge()
        with pytest.raises(InvalidRequest, match="unmerge"):
            composition.place({"robot": LEFT})
    module = make_module()
    composition = composed(module, nla(2), ("head.0",))
    with composition, torch.no_grad():
        composition.place({"robot": LEFT})
        assert module(torch.randn(1, 4, 8, 8)).isfinite().all()  # its tokens are the cells of its input
    tokens = nn.Sequential(nn.Linear(8, 8), nn.SiLU())
    composition = composed(tokens, nla(2), (("0",)))
    with composition, torch.no_grad():
        composition.place({"robot": LEFT})
        with pytest.raises(InvalidRequest, match="lie as the latents do"):
            tokens(torch.randn(1, 12, 8))


@pytest.mark.parametrize(
    ("cells", "latent"), [((8, 8), (8, 8)), ((3, 5), (10, 20)), ((1, 2), (8, 16)), ((1, 1), (1, 1))]
)
def test_grids_that_latents_have(cells: tuple[int, int], latent: tuple[int, int]) -> None:
    check_grid(cells, latent)
    with pytest.raises(InvalidRequest, match="lie as the latents do"):
        check_grid((1, 7), latent)


def test_experts_on_text_alone_take_no_regions(sd: Any) -> None:
    expert = make_expert(sd, "robot", targets=("attn2.to_k", "attn2.to_v"))
    with pytest.raises(InvalidRequest, match="regions do nothing"):
        compose(sd, [expert], gate=GateConfig()).place({"robot": (0, 0, 0.5, 1)})
