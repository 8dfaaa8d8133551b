"""From MoSLoRA to a plain LoRA that every tool reads, and its own files for going on with training."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from peft import get_peft_model_state_dict, set_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import set_requires_grad
from peft.utils.other import get_pattern_key
from torch import Tensor

from mole_diffusion.adapters.config import MoSLoraConfig
from mole_diffusion.adapters.layers import MixerVariant, fold_layer
from mole_diffusion.adapters.mixer import fold_down
from mole_diffusion.adapters.moslora import add_moslora, has_lora, take_off
from mole_diffusion.errors import InvalidFile, InvalidRequest
from mole_diffusion.experts.canonical import Expert, LowRank
from mole_diffusion.experts.peft_folder import CONFIG, WEIGHTS
from mole_diffusion.experts.safefile import read_tensors
from mole_diffusion.experts.save import write_safetensors

_PEFT_PREFIX = "base_model.model."


def fold(model: Any, name: str, *, adapter_name: str = "default", component: str = "unet", **about: Any) -> Expert:
    """The adapter as an expert, its mixers folded in: ``save_expert`` writes it for other tools.

    Args:
        model: holds the adapter; a diffusers model, a ``PeftModel``, or any model with PEFT's layers.
        name: the expert's name.
        adapter_name: which adapter.
        component: the part of the pipeline that the model is.
        about: further fields of the expert (trigger, base, role, metadata).

    Raises:
        InvalidRequest: as :func:`fold_modules`.
    """
    return Expert(name, fold_modules(model, adapter_name=adapter_name, component=component), **about)


def fold_modules(model: Any, *, adapter_name: str = "default", component: str = "unet") -> dict[str, LowRank]:
    """ "<component>.<module path>" → pair with A' = W·A, exact at rank r; plain LoRA layers as they are.

    Raises:
        InvalidRequest: no such adapter, one with biases, or one of another variant, such as DoRA.
    """
    found = {}
    for path, layer in model.named_modules():
        if not isinstance(layer, LoraLayer) or adapter_name not in layer.lora_A:
            continue
        variant = layer.lora_variant.get(adapter_name)
        if variant is not None and not isinstance(variant, MixerVariant):
            raise InvalidRequest(f"Expected LoRA or MoSLoRA at {path}, got {type(variant).__name__}: it cannot fold.")
        if layer.lora_bias.get(adapter_name):
            raise InvalidRequest(f"Expected an adapter without biases at {path}: a plain LoRA file cannot hold them.")
        pair = fold_layer(layer, adapter_name)
        found[f"{component}.{path.removeprefix(_PEFT_PREFIX)}"] = LowRank(pair.a.cpu(), pair.b.cpu(), pair.scale)
    if not found:
        raise InvalidRequest(f"The model has no adapter named {adapter_name!r}.")
    return found


def fold_state(state: Mapping[str, Tensor], config: MoSLoraConfig, *, component: str = "unet") -> dict[str, LowRank]:
    """As :func:`fold_modules`, from ``get_peft_model_state_dict`` or a saved file; needs no model.

    Raises:
        InvalidFile: a key that belongs to no MoSLoRA layer, or a layer without all of A, B and mixer.
    """
    layers: dict[str, dict[str, Tensor]] = {}
    for key, tensor in state.items():
        path, mark, part = key.removeprefix(_PEFT_PREFIX).partition(".lora_mixer.")
        if not mark or part not in ("A", "B", "weight"):
            raise InvalidFile(f"Expected only lora_mixer.A, .B and .weight in a MoSLoRA's state, got {key[:80]!r}.")
        layers.setdefault(path, {})[part] = tensor.detach().cpu()
    for path, parts in layers.items():
        if len(parts) < 3:
            raise InvalidFile(f"Expected A, B and mixer of {path[:80]!r}, got {', '.join(parts)} alone.")
    return {
        f"{component}.{path}": LowRank(
            fold_down(parts["A"], parts["weight"]), parts["B"].float().flatten(1), _scale(config, path)
        )
        for path, parts in layers.items()
    }


def save_moslora(model: Any, folder: str | Path, *, adapter_name: str = "default") -> Path:
    """Write an adapter with its mixers apart, to train on: the folder that PEFT's ``save_pretrained`` writes.

    Other tools find no LoRA in it; :func:`fold` makes the file for them.
    """
    state = get_peft_model_state_dict(model, adapter_name=adapter_name)
    named = {f"{_PEFT_PREFIX}{key.removeprefix(_PEFT_PREFIX)}": value.contiguous() for key, value in state.items()}
    folder = Path(folder)
    write_safetensors(named, folder / WEIGHTS, {"format": "pt"})
    model.peft_config[adapter_name].save_pretrained(str(folder))
    return folder


def load_moslora(model: Any, folder: str | Path, *, adapter_name: str = "default", trainable: bool = False) -> Any:
    """Attach what :func:`save_moslora` or PEFT's ``save_pretrained`` wrote, all of it or nothing.

    Returns:
        The model to use from now on, as :func:`mole_diffusion.adapters.add_moslora`.

    Raises:
        InvalidFile: not a MoSLoRA folder, or its tensors do not belong to this model.
    """
    folder = Path(folder)
    config = _read_config(folder)
    config.inference_mode = not trainable
    state = read_tensors(folder / WEIGHTS)
    fresh = not has_lora(model)
    attached = add_moslora(model, config, adapter_name)
    expected = get_peft_model_state_dict(attached, adapter_name=adapter_name)
    shapes = {key.removeprefix(_PEFT_PREFIX): value.shape for key, value in expected.items()}
    stored = {key.removeprefix(_PEFT_PREFIX): value for key, value in state.items()}
    wrong = [key for key in shapes | stored if key not in stored or shapes.get(key) != stored[key].shape]
    if wrong:
        take_off(model, adapter_name, whole=fresh)
        raise InvalidFile(
            f"{len(wrong)} tensors of this MoSLoRA do not belong to the model ({wrong[0][:80]!r}); nothing was loaded."
        )
    set_peft_model_state_dict(attached, {_PEFT_PREFIX + key: value for key, value in stored.items()}, adapter_name)
    set_requires_grad(attached, adapter_name, trainable)
    return attached


def _read_config(folder: Path) -> MoSLoraConfig:
    path = folder / CONFIG
    try:
        content = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise InvalidFile(f"Expected a MoSLoRA folder with an {CONFIG}, and cannot read {folder.name!r}.") from error
    if not isinstance(content, dict) or "mixer_init" not in content:
        raise InvalidFile(f"Expected a MoSLoRA in {folder.name!r}, but its {CONFIG} names no mixer.")
    return MoSLoraConfig.from_pretrained(str(folder))  # type: ignore[return-value]


def _scale(config: MoSLoraConfig, path: str) -> float:
    """α/r of one module, or α/√r, as PEFT resolves its patterns."""
    ranks, alphas = config.rank_pattern or {}, config.alpha_pattern or {}
    rank = ranks.get(get_pattern_key(list(ranks), path), config.r)
    alpha = alphas.get(get_pattern_key(list(alphas), path), config.lora_alpha)
    return alpha / (math.sqrt(rank) if config.use_rslora else rank)
