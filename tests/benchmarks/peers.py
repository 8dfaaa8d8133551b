"""Other tools on a UNet: PEFT through diffusers' own calls, and X-LoRA's two passes through PEFT's own layers."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from mole_diffusion.experts import Expert


def load_adapters(unet: Any, experts: Sequence[Expert]) -> list[str]:
    """Give the experts to PEFT, one adapter each, as ``load_lora_weights`` does; returns their names."""
    for expert in experts:
        state = {}
        for key, pair in expert.modules.items():
            path = key.removeprefix("unet.")
            state[f"{path}.lora_A.weight"] = pair.a
            state[f"{path}.lora_B.weight"] = pair.b * pair.scale
        load_adapter(unet, state, adapter_name=expert.name, prefix=None)
    settle(unet)
    return [expert.name for expert in experts]


def load_adapter(unet: Any, source: Any, **settings: Any) -> None:
    """One adapter, loaded as pipelines do it: without initialising weights that are replaced at once."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Already found a `peft_config`")  # several adapters are meant
        unet.load_lora_adapter(source, low_cpu_mem_usage=True, **settings)


def settle(unet: Any) -> None:
    """Adapters where the base is and as exact as the base."""
    for parameter in unet.parameters():
        parameter.data = parameter.data.to(unet.conv_in.weight)
    unet.eval()


def set_nla(unet: Any, names: Sequence[str]) -> None:
    """``set_adapters`` with 1/N each."""
    unet.set_adapters(list(names), [1.0 / len(names)] * len(names))


def two_passes(unet: Any, call: Callable[[], Tensor]) -> tuple[Callable[[], Tensor], nn.Linear]:
    """X-LoRA (arXiv 2402.07148) on a UNet that has PEFT's adapters active.

    PEFT's X-LoRA model is made for causal language models, so the passes are written here, around PEFT's own
    ``XLoraLinearLayer``. As there, the first pass runs with a constant scaling of every adapter (it costs the same at
    any value), the classifier reads the last hidden state, and the second pass applies one scaling per row and adapter.

    Returns:
        The call with both passes, and the classifier, zeroed: it starts at 1/N.
    """
    from peft import XLoraConfig
    from peft.tuners.lora import LoraLayer
    from peft.tuners.xlora.layer import XLoraLinearLayer

    layers: list[Any] = [module for module in unet.modules() if isinstance(module, LoraLayer)]
    count = len(layers[0].active_adapters)
    weight = unet.conv_norm_out.weight
    config = XLoraConfig(hidden_size=weight.shape[0], adapters={})
    scalings: dict[str, Tensor] = {}
    hidden: list[Tensor] = []
    owner: Any = SimpleNamespace(disabled=False)

    def inject(module: Any, args: Any, kwargs: Any) -> Any:
        return args, {**kwargs, **scalings}

    for number, layer in enumerate(layers):
        for name in layer.active_adapters:
            layer.set_scale(name, 1.0)
        layer.forward = XLoraLinearLayer(owner, layer, layer.forward, number, config).forward
        layer.register_forward_pre_hook(inject, with_kwargs=True)
    unet.conv_norm_out.register_forward_hook(lambda _, args, output: hidden.append(output))
    classifier = nn.Linear(weight.shape[0], count, device=weight.device, dtype=weight.dtype)
    nn.init.zeros_(classifier.weight)
    nn.init.zeros_(classifier.bias)

    @torch.no_grad()
    def run() -> Tensor:
        hidden.clear()
        scalings["scalings"] = weight.new_full((1, 1, len(layers), count), 1.0 / count)
        call()
        chosen = classifier(hidden.pop().mean((2, 3))).softmax(-1)
        scalings["scalings"] = chosen[:, None, None].expand(-1, 1, len(layers), -1)
        return call()

    return run, classifier
