"""What experts can be composed on: diffusers pipelines, transformers models, any module."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from torch import nn

from mole_diffusion.errors import InvalidRequest
from mole_diffusion.hosts.protocol import Host, Listener, Step

__all__ = ["Host", "Listener", "Step", "host_for"]


def host_for(target: Any) -> Host:
    """The host of a diffusers pipeline, a bare UNet or diffusion transformer, a transformers model, or any module.

    Raises:
        InvalidRequest: none of these.
    """
    from mole_diffusion.hosts.diffusion import DiffusionHost

    if _is_language_model(target) or _is_language_model(getattr(target, "model", None)):
        from mole_diffusion.text.host import TextHost

        return TextHost(target)
    if not isinstance(target, nn.Module):
        if getattr(target, "unet", None) is None and getattr(target, "transformer", None) is None:
            raise InvalidRequest(
                "Experts can be composed on a diffusers pipeline with a UNet or transformer, on a transformers model "
                f"or on a module; got {type(target).__name__}."
            )
        return DiffusionHost(target)
    name = type(target).__name__
    if name.endswith("Transformer2DModel"):
        return DiffusionHost(SimpleNamespace(transformer=target))
    if name == "UNet2DConditionModel":
        return DiffusionHost(SimpleNamespace(unet=target))
    from mole_diffusion.hosts.module import ModuleHost

    return ModuleHost(target)


def _is_language_model(target: Any) -> bool:
    """A transformers model that reads tokens; told by names, so that transformers need not be imported."""
    return getattr(target, "main_input_name", None) == "input_ids" and any(
        kind.__name__ == "PreTrainedModel" for kind in type(target).__mro__
    )
