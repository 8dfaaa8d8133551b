"""LoraConfig as diffusers packs it into a file's header (``lora_adapter_metadata``)."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mole_diffusion.errors import InvalidFile
from mole_diffusion.experts.canonical import COMPONENTS
from mole_diffusion.experts.numbers import as_finite

KEY = "lora_adapter_metadata"
_REFUSED = {
    "lora_bias": "trained biases",
    "use_qalora": "QALoRA",
    "alora_invocation_tokens": "activated LoRA",
    "arrow_config": "Arrow routing",
    "modules_to_save": "fully trained modules",
}
_CHANGE_THE_BASE = ("pissa", "olora", "corda", "loftq")


@dataclass(frozen=True)
class AdapterConfigs:
    """One LoraConfig per component, as plain dictionaries."""

    by_component: Mapping[str, Mapping[str, Any]]

    def __bool__(self) -> bool:
        return bool(self.by_component)

    @classmethod
    def read(cls, metadata: Mapping[str, str]) -> AdapterConfigs:
        """Unpack "unet.lora_alpha": … into one dictionary per component; unprefixed fields hold for all.

        Raises:
            InvalidFile: not JSON, or it asks for something that is not a plain low-rank pair.
        """
        if KEY not in metadata:
            return cls({})
        try:
            flat = json.loads(metadata[KEY])
        except (ValueError, RecursionError) as error:
            raise InvalidFile(f"The {KEY} of this file is not JSON: the file is damaged.") from error
        if not isinstance(flat, dict):
            raise InvalidFile(f"The {KEY} of this file is not a JSON object: the file is damaged.")
        common = {key: value for key, value in flat.items() if key.split(".", 1)[0] not in COMPONENTS}
        configs = {component: {**common, **_fields(flat, component)} for component in COMPONENTS}
        for config in configs.values():
            start = str(config.get("init_lora_weights", "")).lower()
            if start.startswith(_CHANGE_THE_BASE):
                raise InvalidFile(
                    f"This LoRA was begun with {start[:20]!r} and belongs to a changed base: save it as a LoRA first "
                    "(PEFT: save_pretrained(path_initial_model_for_weight_conversion=…))."
                )
            for field, meaning in _REFUSED.items():
                if config.get(field):
                    raise InvalidFile(f"This LoRA uses {meaning} ({field}), which is not supported: merge it first.")
        return cls({component: config for component, config in configs.items() if "lora_alpha" in config})

    def alpha_and_scale(self, module: str, rank: int) -> tuple[float, float] | None:
        """(α, scale) of a module of this rank: α / r, or α / √r with rsLoRA; None where nothing is stated."""
        component, _, path = module.partition(".")
        config = self.by_component.get(component)
        if config is None:
            return None
        alpha = _pattern(config.get("alpha_pattern"), path, config["lora_alpha"])
        value = as_finite(alpha)
        if value is None:
            raise InvalidFile(f"The alpha of {module} must be a finite number, got {str(alpha)[:40]!r}.")
        return value, value / (math.sqrt(rank) if config.get("use_rslora") else rank)

    def check_magnitude(self, module: str, magnitude: Any) -> None:
        """Raises InvalidFile where the configuration says DoRA and the module has no magnitude."""
        if magnitude is None and self.by_component.get(module.partition(".")[0], {}).get("use_dora"):
            raise InvalidFile(
                f"This file says that it is DoRA, but {module} has no lora_magnitude_vector: without it the module "
                "would change in another way. Export it again."
            )


def _fields(flat: Mapping[str, Any], component: str) -> dict[str, Any]:
    prefix = f"{component}."
    return {key.removeprefix(prefix): value for key, value in flat.items() if key.startswith(prefix)}


def _pattern(patterns: Any, path: str, default: Any) -> Any:
    """PEFT's rule: the first pattern that equals the path or ends it after a dot; literal names only.

    Raises:
        InvalidFile: PEFT would read the pattern as a regular expression, which strangers' files may not bring.
    """
    if not isinstance(patterns, dict):
        return default
    bare = path.removeprefix("text_model.")
    for pattern, value in patterns.items():
        if re.search(r"[\\\[\](){}*+?|]", str(pattern)):
            raise InvalidFile(f"The alpha pattern {str(pattern)[:60]!r} is no plain module name: not supported.")
        literal = re.sub(r"^\^|\$$", "", str(pattern)).removeprefix("text_model.")
        if bare == literal or bare.endswith(f".{literal}"):
            return value
    return default
