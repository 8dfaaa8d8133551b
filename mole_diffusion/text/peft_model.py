"""Adapters that a PEFT model holds in memory, as experts."""

from __future__ import annotations

from typing import Any

from mole_diffusion.errors import InvalidRequest
from mole_diffusion.experts.canonical import Expert

_PARTS = (".lora_A.", ".lora_B.", ".lora_mixer.")


def from_peft(model: Any, name: str, *, adapter_name: str = "default", **about: Any) -> Expert:
    """One adapter of a ``PeftModel`` around a language model, as an expert.

    Args:
        model: the ``PeftModel``.
        name: the expert's name.
        adapter_name: which adapter.
        about: further fields of the expert (trigger, base, role, metadata).

    Raises:
        InvalidRequest: no such adapter, or it has more than low-rank pairs (embeddings, biases, DoRA, whole modules).
    """
    from peft import get_peft_model_state_dict

    from mole_diffusion.adapters import fold

    if adapter_name not in getattr(model, "peft_config", {}):
        raise InvalidRequest(f"The model has no adapter named {adapter_name!r}.")
    state = get_peft_model_state_dict(model, adapter_name=adapter_name, save_embedding_layers=False)
    other = [key for key in state if not any(part in key for part in _PARTS)]
    if other:
        raise InvalidRequest(f"The adapter {adapter_name!r} has more than low-rank pairs, such as {other[0]!r}.")
    return fold(model, name, adapter_name=adapter_name, component="model", **about)
