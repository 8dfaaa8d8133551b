"""Attach MoSLoRA adapters to a model, and take them off again."""

from __future__ import annotations

from typing import Any, NoReturn

from peft import PeftModel, get_peft_model
from peft.import_utils import is_bnb_4bit_available
from peft.tuners.lora import layer as lora
from torch import nn

from mole_diffusion.adapters.config import MoSLoraConfig
from mole_diffusion.adapters.layers import MixerConv2d, MixerLayer, MixerLinear
from mole_diffusion.errors import InvalidRequest


def register_moslora(config: MoSLoraConfig) -> MoSLoraConfig:
    """Tell PEFT which layers this configuration makes. Not saved: needed again for a configuration read from a file."""
    modules: dict[type[nn.Module], Any] = {}
    if is_bnb_4bit_available():
        from mole_diffusion.adapters.quantised import LINEAR_4BIT, MixerLinear4bit

        modules[LINEAR_4BIT] = MixerLinear4bit
    config._custom_modules = {**modules, nn.Linear: MixerLinear, nn.Conv2d: MixerConv2d, nn.Module: _refuse_module}
    return config


def add_moslora(model: Any, config: MoSLoraConfig, adapter_name: str = "default") -> Any:
    """Attach a MoSLoRA adapter and make it the active one. Mixers come from torch's random state.

    Args:
        model: a diffusers model (changed in place), a ``PeftModel``, or any other module (wrapped in a ``PeftModel``).
        config: what to attach.
        adapter_name: must be new to the model.

    Returns:
        The model to use from now on.

    Raises:
        InvalidRequest: the name is taken, the model holds plain LoRA layers already, or a target is neither Linear nor
            Conv2d.
    """
    if adapter_name in getattr(model, "peft_config", {}):
        raise InvalidRequest(f"The model already has an adapter named {adapter_name!r}; choose another name.")
    plain = next((m for m in model.modules() if isinstance(m, lora.LoraLayer) and not isinstance(m, MixerLayer)), None)
    if plain is not None:
        raise InvalidRequest(
            f"The model already has LoRA layers without room for a mixer ({type(plain).__name__}): attach the MoSLoRA "
            "adapter first, then the plain ones."
        )
    register_moslora(config)
    fresh = not has_lora(model)
    try:
        return _attach(model, config, adapter_name)
    except InvalidRequest:
        take_off(model, adapter_name, whole=fresh)
        raise


def has_lora(model: nn.Module) -> bool:
    """Does the model hold LoRA layers of any kind?"""
    return any(isinstance(module, lora.LoraLayer) for module in model.modules())


def take_off(model: Any, adapter_name: str, *, whole: bool) -> None:
    """Remove an adapter that was attached in part; ``whole``: and the layers, so that the model is as it was."""
    for path, layer in list(model.named_modules()):
        if isinstance(layer, MixerLayer) and whole:
            model.set_submodule(path, layer.get_base_layer())  # type: ignore[attr-defined]
        elif isinstance(layer, MixerLayer):
            layer.delete_adapter(adapter_name)  # type: ignore[attr-defined]
    getattr(model, "peft_config", {}).pop(adapter_name, None)
    if whole and hasattr(model, "peft_config"):
        del model.peft_config
    if whole and hasattr(model, "_hf_peft_config_loaded"):
        model._hf_peft_config_loaded = False


def _attach(model: Any, config: MoSLoraConfig, adapter_name: str) -> Any:
    from diffusers.loaders.peft import PeftAdapterMixin

    if isinstance(model, PeftModel):
        model.add_adapter(adapter_name, config)
        model.set_adapter(adapter_name)
        return model
    if isinstance(model, PeftAdapterMixin):
        model.add_adapter(config, adapter_name)
        return model
    return get_peft_model(model, config, adapter_name)


def _refuse_module(target: Any, adapter_name: str, **kwargs: Any) -> NoReturn:
    raise InvalidRequest(
        f"Expected Linear and Conv2d modules under a mixer, but {kwargs.get('target_name')!r} is "
        f"{type(target).__name__}; leave it out of target_modules."
    )
