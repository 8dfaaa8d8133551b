"""What to train: PEFT's LoRA settings with a mixer."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

from peft import LoraConfig

from mole_diffusion.adapters.mixer import check_mixer
from mole_diffusion.errors import InvalidRequest

# Options of PEFT that train or need more than A, B and the mixer.
_UNFOLDABLE = ("lora_bias", "target_parameters", "layer_replication", "modules_to_save", "trainable_token_indices")


@dataclass
class MoSLoraConfig(LoraConfig):
    """PEFT's ``LoraConfig`` with a mixer. Attach it with :func:`add_moslora`.

    Raises:
        InvalidRequest: a mixer that cannot be trained, or options that have no meaning beside one.
    """

    mixer_init: str = field(
        default="kaiming",
        metadata={"help": "kaiming, orthogonal, normal, identity or butterfly (fixed).", "is_lora_variant": True},
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        for rank in (self.r, *(self.rank_pattern or {}).values()):
            check_mixer(self.mixer_init, rank)
        others = [item.name for item in dataclasses.fields(self) if item.metadata.get("is_lora_variant")]
        others += _UNFOLDABLE
        clash = next((name for name in others if name != "mixer_init" and getattr(self, name)), None)
        if clash:
            raise InvalidRequest(f"A mixer cannot be combined with {clash}; leave one of the two out.")
        if self.bias != "none":
            raise InvalidRequest(
                f"Trained biases cannot be folded into a LoRA: expected bias 'none', got {self.bias!r}."
            )
        if self.init_lora_weights not in (True, False, "gaussian"):
            raise InvalidRequest(
                f"Expected init_lora_weights True, False or 'gaussian' beside a mixer, got {self.init_lora_weights!r}."
            )

    @classmethod
    def from_peft_type(cls, **kwargs: Any) -> MoSLoraConfig:
        """As PEFT's, but of this class: the files name PEFT's LoRA as their type."""
        kwargs.pop("peft_type", None)
        return super().from_peft_type(**kwargs)  # type: ignore[return-value]

    @property
    def _custom_modules(self) -> dict[Any, Any]:  # pyright: ignore[reportIncompatibleVariableOverride]
        """What PEFT asks for when it makes or extends a layer."""
        if not self._layers:
            raise InvalidRequest(
                "A MoSLoRA adapter is attached with add_moslora, or after register_moslora(config). PEFT's "
                "add_weighted_adapter cannot blend mixers: fold the adapters and compose the experts instead."
            )
        return self._layers

    @_custom_modules.setter
    def _custom_modules(self, modules: dict[Any, Any] | None) -> None:
        self._layers = modules
