"""From a Base to a ready pipeline: safetensors only, from a folder or from an allow-listed hub id."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

from mole_diffusion.errors import InvalidFile, InvalidRequest

if TYPE_CHECKING:
    from mole_diffusion.bases.base import Base


def load_pipeline(base: Base, device: torch.device | str, dtype: torch.dtype | None) -> Any:
    """See ``Base.load``."""
    precision = dtype or torch.float32
    try:
        with _without_progress_bars():
            pipe = _from_pretrained(base, precision)
    except (OSError, ValueError, RuntimeError) as error:
        raise _unreadable(base, error) from error
    _use_ddim(pipe)
    _freeze(pipe)
    pipe.set_progress_bar_config(disable=True)
    return pipe.to(device)


def _from_pretrained(base: Base, dtype: torch.dtype) -> Any:
    arguments: dict[str, Any] = {"dtype": dtype, "use_safetensors": True, **base.traits.pipeline_arguments()}
    if base.half_vae is not None and dtype == torch.float16:
        arguments["vae"] = _half_vae(base.half_vae)
    pipeline = base.traits.pipeline_class()
    if base.is_local:
        return pipeline.from_pretrained(base.source, local_files_only=True, **arguments)
    return _from_hub(pipeline, base, dtype, arguments)


def _from_hub(pipeline: Any, base: Base, dtype: torch.dtype, arguments: dict[str, Any]) -> Any:
    """Half-precision files where half precision is wanted and the repository has them: half the download."""
    if dtype == torch.float32:
        return pipeline.from_pretrained(base.source, revision=base.revision, **arguments)
    try:
        return pipeline.from_pretrained(base.source, revision=base.revision, variant="fp16", **arguments)
    except (ValueError, OSError) as error:
        if "variant" not in str(error):
            raise
    return pipeline.from_pretrained(base.source, revision=base.revision, **arguments)


def _half_vae(source: str) -> Any:
    from diffusers import AutoencoderKL

    return AutoencoderKL.from_pretrained(source, dtype=torch.float16, use_safetensors=True)


def _unreadable(base: Base, error: Exception) -> InvalidRequest:
    if base.is_local:
        cause = str(error).strip().splitlines()[0].rstrip(".") if str(error).strip() else type(error).__name__
        return InvalidRequest(f"The base in {base.source} cannot be loaded: {cause}.")
    return InvalidRequest(
        f"{base.title} was found neither on this machine nor on the model hub ({base.source}): connect to "
        "huggingface.co once, or download the model's folder and give its path as the base."
    )


@contextmanager
def _without_progress_bars() -> Iterator[None]:
    """Loading a folder takes a second or two: bars of the libraries would only mix with the caller's own output."""
    import diffusers.utils.logging as diffusers_logging
    import transformers.utils.logging as transformers_logging

    switched = [log for log in (diffusers_logging, transformers_logging) if log.is_progress_bar_enabled()]
    for log in switched:
        log.disable_progress_bar()
    try:
        yield
    finally:
        for log in switched:
            log.enable_progress_bar()


def _use_ddim(pipe: Any) -> None:
    """DDIM from the base's own noise schedule. ``clip_sample`` would clip the latents to ±1 and ruin every picture."""
    from diffusers import DDIMScheduler

    config = dict(pipe.scheduler.config)
    # The last alpha of SD is that of timestep 0, which other schedulers' configurations do not say.
    config.setdefault("set_alpha_to_one", False)
    scheduler: Any = DDIMScheduler.from_config(config, clip_sample=False)
    zero_snr = bool(scheduler.alphas_cumprod[-1] == 0)
    if zero_snr and scheduler.config["prediction_type"] == "epsilon":
        raise InvalidRequest(
            "The base predicts noise but its schedule ends in pure noise (zero terminal SNR), which contradict each "
            "other: set rescale_betas_zero_snr to false in its scheduler_config.json."
        )
    pipe.scheduler = scheduler


def _freeze(pipe: Any) -> None:
    for name, component in pipe.components.items():
        if isinstance(component, torch.nn.Module):
            if any(parameter.is_meta for parameter in component.parameters()):
                raise InvalidFile(f"Weights of the base's {name} are missing from its files: fetch the base again.")
            component.requires_grad_(False).eval()
