"""A folder as PEFT's ``save_pretrained`` writes it: the weights, and beside them the scale that they need."""

from __future__ import annotations

import json
from pathlib import Path

from mole_diffusion.errors import InvalidFile
from mole_diffusion.experts.formats.adapter_config import KEY
from mole_diffusion.experts.safefile import Source

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
_MAX_CONFIG = 2**20


def weights_of(source: Source) -> Source:
    """The file to read: of a folder its weights, of anything else itself.

    Raises:
        InvalidFile: the folder has no safetensors weights; pickled ones are never opened.
    """
    if isinstance(source, bytes) or not Path(source).is_dir():
        return source
    weights = Path(source) / WEIGHTS
    if not weights.is_file():
        ask = "name a LoRA file, or a folder that PEFT's save_pretrained wrote"
        if (Path(source) / "adapter_model.bin").is_file():
            ask = "its adapter_model.bin is a pickle and never opened: save it again with safe_serialization=True"
        raise InvalidFile(f"The folder {Path(source).name!r} holds no {WEIGHTS}; {ask}.")
    return weights


def config_beside(source: Source) -> dict[str, str]:
    """The adapter_config.json beside a file named as PEFT names it, as the header entry that diffusers writes.

    Raises:
        InvalidFile: it is no JSON object, or not a LoRA's.
    """
    if isinstance(source, bytes) or Path(source).name != WEIGHTS:
        return {}
    path = Path(source).with_name(CONFIG)
    if not path.is_file():
        return {}
    if path.stat().st_size > _MAX_CONFIG:
        raise InvalidFile(f"{CONFIG} is larger than {_MAX_CONFIG >> 20} MB: the folder is damaged.")
    try:
        content = json.loads(path.read_text("utf-8"))
    except (ValueError, RecursionError) as error:
        raise InvalidFile(f"{CONFIG} is not JSON: the folder is damaged.") from error
    kind = content.get("peft_type") if isinstance(content, dict) else None
    if kind != "LORA":
        raise InvalidFile(f"Expected a LoRA in {CONFIG}, got peft_type {str(kind)[:40]!r}.")
    return {KEY: json.dumps(content)}
