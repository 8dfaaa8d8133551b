"""What differs between the families of Stable Diffusion: towers, added conditions, pipeline class. Nothing else in this
package may ask which family a base belongs to."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol

import torch

from mole_diffusion.bases.conditioning import Conditioning

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline


class Family(Protocol):
    """The questions whose answer depends on the family."""

    components: tuple[str, ...]
    """Modules that an expert may touch, the UNet first."""

    def pipeline_class(self) -> Any:
        """The diffusers pipeline class."""
        ...

    def pipeline_arguments(self) -> dict[str, Any]:
        """Arguments of ``from_pretrained`` beyond the usual ones."""
        ...

    def encode(
        self, pipe: DiffusionPipeline, prompts: list[str], negatives: list[str] | None, size: tuple[int, int]
    ) -> Conditioning:
        """Encoded prompts; see ``Base.encode``."""
        ...


class StableDiffusion:
    """One CLIP text tower, no added conditions (SD 1.x, 2.x, the demo base)."""

    components: tuple[str, ...] = ("unet", "text_encoder")

    def pipeline_class(self) -> Any:
        from diffusers import StableDiffusionPipeline

        return StableDiffusionPipeline

    def pipeline_arguments(self) -> dict[str, Any]:
        return {"safety_checker": None, "requires_safety_checker": False}

    def encode(self, pipe: Any, prompts: list[str], negatives: list[str] | None, size: tuple[int, int]) -> Conditioning:
        embeds, unconditional = pipe.encode_prompt(**_encode_arguments(pipe, prompts, negatives))
        return Conditioning(embeds if negatives is None else torch.cat([unconditional, embeds]))


class StableDiffusionXL:
    """Two text towers, a pooled embedding and the picture's size as added conditions."""

    components: tuple[str, ...] = ("unet", "text_encoder", "text_encoder_2")

    def pipeline_class(self) -> Any:
        from diffusers import StableDiffusionXLPipeline

        return StableDiffusionXLPipeline

    def pipeline_arguments(self) -> dict[str, Any]:
        return {"add_watermarker": False}

    def encode(self, pipe: Any, prompts: list[str], negatives: list[str] | None, size: tuple[int, int]) -> Conditioning:
        encoded = pipe.encode_prompt(**_encode_arguments(pipe, prompts, negatives))
        embeds, unconditional, pooled, unconditional_pooled = encoded
        if negatives is not None:
            embeds, pooled = torch.cat([unconditional, embeds]), torch.cat([unconditional_pooled, pooled])
        height, width = size
        time_ids = torch.tensor([[height, width, 0, 0, height, width]], dtype=embeds.dtype, device=embeds.device)
        return Conditioning(embeds, {"text_embeds": pooled, "time_ids": time_ids.repeat(len(embeds), 1)})


def _encode_arguments(pipe: Any, prompts: Sequence[str], negatives: Sequence[str] | None) -> dict[str, Any]:
    """Arguments of ``encode_prompt``. No negative prompt at all is passed as None: SDXL then uses zeros."""
    given = negatives is not None and any(negatives)
    return {
        "prompt": list(prompts),
        "device": pipe._execution_device,
        "num_images_per_prompt": 1,
        "do_classifier_free_guidance": negatives is not None,
        "negative_prompt": list(negatives) if negatives is not None and given else None,
    }


FAMILIES: dict[str, Family] = {
    "demo": StableDiffusion(),
    "sd1": StableDiffusion(),
    "sd21": StableDiffusion(),
    "sdxl": StableDiffusionXL(),
}
