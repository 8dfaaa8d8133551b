"""MoSLoRA, Mixture-of-Subspaces LoRA (arXiv 2406.11909), as a variant of PEFT's LoRA.

y = W0·x + (α/r)·B·W·A·dropout(x), with a mixer W ∈ R^{r×r} that is trained beside A ∈ R^{r×d_in} and B ∈ R^{d_out×r}.

A tool that does not know the mixer must not load A and B alone, as warnings about unexpected keys are easily missed.
State dicts therefore hold no ``lora_A`` and ``lora_B`` but ``lora_mixer.<adapter>.A``, ``.B`` and ``.weight``: PEFT's
own functions carry them unchanged, other loaders find nothing that they could apply.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch.nn.functional as F
from peft import LoraConfig
from peft.tuners.lora import layer as lora
from torch import Tensor, nn

from mole_diffusion.adapters.config import MoSLoraConfig
from mole_diffusion.adapters.mixer import FIXED, fold_down, init_mixer
from mole_diffusion.errors import InvalidRequest
from mole_diffusion.experts.canonical import LowRank


class Mixer(nn.Module):
    """Holds W, (r, r); a fixed one is a buffer, so that no optimiser moves it."""

    weight: Tensor

    def __init__(self, weight: Tensor, *, trained: bool) -> None:
        super().__init__()
        if trained:
            self.weight = nn.Parameter(weight)
        else:
            self.register_buffer("weight", weight)


class MixerVariant(lora.LoraVariant):
    """What PEFT calls in place of the plain B·A."""

    @staticmethod
    def init(module: Any, adapter_name: str, config: MoSLoraConfig, **kwargs: Any) -> None:
        """Draw the mixer, on the device and in the dtype of A."""
        _ = config._custom_modules  # raises where PEFT made this configuration from another one
        _refuse_base(module.get_base_layer(), module.packed)
        if not hasattr(module, "lora_mixer"):
            module.lora_mixer = nn.ModuleDict()
            module.adapter_layer_names = (*module.adapter_layer_names, "lora_mixer")
        a = module.lora_A[adapter_name].weight
        trained = config.mixer_init not in FIXED
        # A on the meta device waits for a file's values; PEFT moves waiting parameters later, but no waiting buffers.
        device = a.device if trained or not a.is_meta else "cpu"
        mixer = init_mixer(config.mixer_init, module.r[adapter_name]).to(device, a.dtype)
        module.lora_mixer[adapter_name] = Mixer(mixer, trained=trained)

    @staticmethod
    def forward(module: Any, active_adapter: str, x: Tensor, result: Tensor, **kwargs: Any) -> Tensor:
        """result + (α/r)·B·W·A·dropout(x)."""
        hidden = module.lora_A[active_adapter](module.lora_dropout[active_adapter](x))
        mixer = module.lora_mixer[active_adapter].weight.to(hidden.dtype)
        convolution = isinstance(module, lora.Conv2d)
        mixed = F.conv2d(hidden, mixer[:, :, None, None]) if convolution else F.linear(hidden, mixer)
        return result + module.lora_B[active_adapter](mixed) * module.scaling[active_adapter]

    @staticmethod
    def merge_safe(module: Any, active_adapter: str, orig_weight: Tensor) -> Tensor:
        """W0 + ΔW as a new tensor."""
        return orig_weight + module.get_delta_weight(active_adapter).to(orig_weight.dtype)

    @staticmethod
    def merge_unsafe(module: Any, active_adapter: str, orig_weight: Tensor) -> None:
        """W0 + ΔW in place."""
        orig_weight.data += module.get_delta_weight(active_adapter).to(orig_weight.dtype)

    @staticmethod
    def unmerge(module: Any, active_adapter: str, orig_weight: Tensor) -> Tensor:
        """W0 of a merged weight."""
        return orig_weight.data - module.get_delta_weight(active_adapter).to(orig_weight.dtype)


class MixerLayer:
    """What a LoRA layer of PEFT needs to hold adapters with a mixer, beside adapters without one."""

    packed = False
    """Is the base weight a bitsandbytes 4-bit one?"""

    def resolve_lora_variant(self, *, config: LoraConfig, **kwargs: Any) -> Any:
        """The mixer for its configuration, PEFT's own choice for every other."""
        if isinstance(config, MoSLoraConfig):
            return MixerVariant()
        return super().resolve_lora_variant(config=config, **kwargs)  # type: ignore[misc]

    def get_delta_weight(self, adapter: str) -> Tensor:
        """ΔW = (α/r)·B·W·A in the shape of the base weight."""
        if adapter not in _mixers(self):
            return super().get_delta_weight(adapter)  # type: ignore[misc]
        return fold_layer(self, adapter).delta().to(_factor(self.lora_B, adapter).dtype)  # type: ignore[attr-defined]

    def state_dict(self, *args: Any, prefix: str = "", **kwargs: Any) -> dict[str, Any]:
        """As torch's, with A and B beside their mixer."""
        state = super().state_dict(*args, prefix=prefix, **kwargs)  # type: ignore[misc]
        for here, stored in self._renamed(prefix):
            if here in state:
                state[stored] = state.pop(here)
        return state

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        for here, stored in self._renamed(prefix):
            if stored in state_dict:
                state_dict[here] = state_dict.pop(stored)
        super()._load_from_state_dict(state_dict, prefix, *args)  # type: ignore[misc]

    def _renamed(self, prefix: str) -> Iterator[tuple[str, str]]:
        for adapter in _mixers(self):
            for part in "AB":
                yield f"{prefix}lora_{part}.{adapter}.weight", f"{prefix}lora_mixer.{adapter}.{part}"


class MixerLinear(MixerLayer, lora.Linear):
    """A linear module with MoSLoRA adapters."""


class MixerConv2d(MixerLayer, lora.Conv2d):
    """A convolution with MoSLoRA adapters; W mixes the channels between A (k×k) and B (1×1)."""


def fold_layer(layer: Any, adapter: str) -> LowRank:
    """One layer's adapter as a plain LoRA pair of the same rank, fp32; without a mixer, A as it is."""
    a, b = _factor(layer.lora_A, adapter), _factor(layer.lora_B, adapter)
    mixers = _mixers(layer)
    down = fold_down(a, mixers[adapter].weight.detach()) if adapter in mixers else a.float()
    return LowRank(down, b.float().flatten(1), float(layer.scaling[adapter]))


def _mixers(layer: Any) -> Any:
    return getattr(layer, "lora_mixer", {})


def _factor(factors: Any, adapter: str) -> Tensor:
    return factors[adapter].weight.detach()


def _refuse_base(base: nn.Module, packed: bool) -> None:
    if isinstance(base, nn.Conv2d) and base.groups > 1:
        raise InvalidRequest(f"Expected a convolution without groups under a mixer, got {base.groups} groups.")
    if not packed and type(base).__module__.startswith("bitsandbytes"):
        raise InvalidRequest(f"Expected an unquantised or 4-bit base under a mixer, got {type(base).__name__}.")
