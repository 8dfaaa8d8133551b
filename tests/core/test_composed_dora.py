"""DoRA experts in composed layers: against the definition, against PEFT, and merged."""

from __future__ import annotations

import copy
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig, get_peft_model

from mole_diffusion import Expert, GateConfig, StaticWeights, compose
from mole_diffusion.composition import nla
from mole_diffusion.errors import InvalidRequest
from mole_diffusion.experts import LowRank
from tests.core.small import HOSTS, add_experts, run_model
from tests.core.test_contract import announce, close, experts_of, pipe_of, run


def dora(host: str) -> tuple[Expert, ...]:
    """Experts with trained magnitudes on linear layers and convolutions, and one without."""
    random = torch.Generator().manual_seed(9)
    plain, second, third = experts_of(host)
    changed = [
        Expert(expert.name, {
            key: replace(pair, magnitude=torch.rand(pair.b.shape[0], generator=random) + 0.5)
            for key, pair in expert.modules.items()
        }, trigger=expert.trigger)
        for expert in (plain, second)
    ]  # fmt: skip
    return (*changed, third)


@pytest.mark.parametrize("host", ["sd", "pixart", "module"])
@torch.no_grad()
def test_dora_alone_halved_together_and_merged(host: str) -> None:
    """Alone: W'; gated half: half of W' − W; and merged is unmerged."""
    pipe, found = pipe_of(host), dora(host)
    before = run_model(pipe)
    for weights in ((1.0, 0.0, 0.0), (0.5, 0.0, 0.0), (0.3, 0.5, 0.2)):
        expected = run_model(add_experts(HOSTS[host](), dict(zip(found, weights, strict=True))))
        composition = compose(pipe, found, gate=StaticWeights(weights))
        with composition:
            close(run(host, composition), expected)
            composition.merge()
            close(run_model(pipe), expected)
            composition.unmerge()
            composition.mask(*composition.names)
            assert torch.equal(run_model(pipe), before)
    with compose(pipe, found, gate=GateConfig(scope="token")) as composition:
        close(run(host, composition), run_model(add_experts(HOSTS[host](), dict.fromkeys(found, 1 / 3))))
    with pytest.raises(InvalidRequest, match="is DoRA"):
        compose(pipe, found, gate=nla(3)).collapse()


def test_dora_is_what_peft_makes_of_it() -> None:
    pipe, targets = HOSTS["sd"](), ["attn2.to_q", "ff.net.2", "conv1", "downsamplers.0.conv"]
    asked = LoraConfig(r=2, lora_alpha=5, target_modules=targets, init_lora_weights=False, use_dora=True)
    model = get_peft_model(copy.deepcopy(pipe.unet), asked)
    modules = {}
    with torch.no_grad():
        for path, layer in model.base_model.model.named_modules():
            if hasattr(layer, "lora_magnitude_vector"):
                magnitude = layer.lora_magnitude_vector["default"].weight
                magnitude.mul_(1.3)
                a, b = (getattr(layer, f"lora_{side}")["default"].weight.detach() for side in "AB")
                modules[f"unet.{path}"] = LowRank(a, b.flatten(1), 2.5, magnitude.detach().flatten().clone())
        expected = run_model(SimpleNamespace(unet=model.base_model.model, tokenizer=pipe.tokenizer))
        with compose(pipe, [Expert("dora", modules)], gate=nla(1)) as composition:
            announce(composition)
            close(run_model(pipe), expected, 1e-4)
