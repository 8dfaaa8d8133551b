"""The adapter that a subject trains: put on a pipeline, read out as plain low-rank pairs, taken off again."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

import torch

from mole_diffusion.bases import Base

if TYPE_CHECKING:
    from peft import LoraConfig

    from mole_diffusion.experts.canonical import LowRank
    from training.tasks.subject_config import SubjectConfig

ADAPTER = "subject"
ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
TARGETS = {"attention": ATTENTION, "all": (*ATTENTION, "ff.net.0.proj", "ff.net.2", "conv1", "conv2")}
TEXT_TARGETS = ("q_proj", "k_proj", "v_proj", "out_proj")


def trained_components(base: Base, config: SubjectConfig) -> tuple[str, ...]:
    """The parts of the pipeline that learn, the UNet first."""
    return base.components if config.train_text_encoders else ("unet",)


def target_paths(base: Base, config: SubjectConfig, component: str) -> list[str]:
    """Paths of the modules in ``component`` that learn."""
    tails = TEXT_TARGETS
    if component == "unet":
        tails = base.lora_targets if config.targets is None else TARGETS[config.targets]
    inside = [key.removeprefix(f"{component}.") for key in base.module_shapes() if key.startswith(f"{component}.")]
    return [path for path in inside if f".{path}".endswith(tuple(f".{tail}" for tail in tails))]


def attach_adapter(pipe: Any, base: Base, config: SubjectConfig) -> dict[str, torch.nn.Parameter]:
    """Add a LoRA or MoSLoRA to the target modules: "<component>.<name>" → parameter, float32, drawn from the seed."""
    from peft import inject_adapter_in_model

    parameters = {}
    with torch.random.fork_rng(), warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        torch.manual_seed(config.seed)
        for component in trained_components(base, config):
            model, settings = getattr(pipe, component), _settings(config, target_paths(base, config, component))
            if component == "unet":
                model.add_adapter(settings, adapter_name=ADAPTER)
            else:
                inject_adapter_in_model(settings, model, ADAPTER)
            trained = [(name, value) for name, value in model.named_parameters() if value.requires_grad]
            parameters |= {f"{component}.{name}": value for name, value in trained}
    for value in parameters.values():
        value.data = value.data.float()
    return parameters


def _settings(config: SubjectConfig, paths: list[str]) -> LoraConfig:
    from peft import LoraConfig

    from mole_diffusion.adapters import MoSLoraConfig, register_moslora

    common: dict[str, Any] = {
        "r": config.rank, "lora_alpha": config.alpha or config.rank, "target_modules": paths,
        "init_lora_weights": True, "lora_dropout": 0.0,
    }  # fmt: skip
    if config.adapter == "lora":
        return LoraConfig(**common)
    return register_moslora(MoSLoraConfig(**common, mixer_init=config.mixer_init))


def adapter_modules(pipe: Any, base: Base, config: SubjectConfig) -> dict[str, LowRank]:
    """The trained adapter in canonical form, mixers folded in: "<component>.<path>" → low-rank pair."""
    from mole_diffusion.adapters import fold_modules

    found = {}
    for component in trained_components(base, config):
        found |= fold_modules(getattr(pipe, component), adapter_name=ADAPTER, component=component)
    return found


def detach_adapter(pipe: Any, base: Base, config: SubjectConfig) -> None:
    """Inverse of :func:`attach_adapter`: the modules are the base's own again."""
    from peft.tuners.lora import LoraLayer

    for component in trained_components(base, config):
        model = getattr(pipe, component)
        if component == "unet":
            model.unload_lora()
            continue
        for path, layer in list(model.named_modules()):
            if isinstance(layer, LoraLayer):
                model.set_submodule(path, layer.get_base_layer())
        vars(model).pop("peft_config", None)
