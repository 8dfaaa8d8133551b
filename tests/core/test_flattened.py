"""The paper's literal gate: Eq. 9-11 written out, and the one size that it is made for."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch

from mole_diffusion import GateConfig
from mole_diffusion.errors import InvalidRequest
from tests.core.small import randomise
from tests.core.test_contract import close, composed, pipe_of, run


@torch.no_grad()
def test_the_flattened_gate_is_the_papers() -> None:
    """Eq. 9-11 for the first block, with E_i from copies of it that hold one expert each."""
    pipe, config = pipe_of("pixart"), GateConfig(input="flattened", latent=(8, 8), temperature=0.8)
    composition = composed("pixart", config, count=3)
    randomise(composition, size=0.05)
    name = "transformer_blocks.0"
    seen: list[Any] = []
    block = pipe.transformer.get_submodule(name)
    handle = block.register_forward_pre_hook(lambda _, args, kwargs: seen.append((args, kwargs)), with_kwargs=True)
    with composition:
        run("pixart", composition)
        found = composition._context.records[name].probabilities
    handle.remove()
    outputs = []
    for expert in composition.experts:
        alone = copy.deepcopy(block)
        for path, module in alone.named_modules():
            if (pair := expert.modules.get(f"transformer.{name}.{path}")) is not None:
                module.weight.copy_(pair.applied_to(module.weight))
        outputs.append(alone(*seen[0][0], **seen[0][1]))
    whole = torch.cat([torch.nn.functional.layer_norm(output, output.shape[-1:]) for output in outputs], -1)
    e, log_tau = (
        composition.state_dict()[f"blocks.transformer_blocks/0.{key}"] for key in ("logits.weight", "log_tau")
    )
    assert e.T.shape == (3 * 16 * 16, 3)
    close(found[:, 0], (whole.flatten(1) @ e.T / log_tau.exp()).softmax(-1))
    assert float(found.std()) > 0.01


def test_the_flattened_gate_is_for_one_size() -> None:
    config = GateConfig(input="flattened", latent=(8, 8))
    with composed("sd", config) as composition, pytest.raises(InvalidRequest, match=r"latents of \(8, 8\), 64 tokens"):
        run("sd", composition, size=(8, 16))
    with pytest.raises(InvalidRequest, match="does not say"):
        composed("module", config)
    for settings in ({"latent": None}, {"scope": "token"}, {"latent": (8,)}, {"latent": (8, 0)}, {"input": "hidden"}):
        with pytest.raises(InvalidRequest):
            replace(config, **settings)
    with pytest.raises(InvalidRequest, match="whole layers or blocks"):
        replace(config, granularity="matrix")
