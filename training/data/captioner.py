"""Captions made by BLIP (arXiv 2201.12086) from the hub: safetensors only, one pinned revision, no code of others."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from mole_diffusion.errors import InvalidRequest

MODEL = "Salesforce/blip-image-captioning-large"
REVISION = "2227ac38c9f16105cb0412e7cab4759978a8fd90"
"""The large model: of the base model the hub holds no safetensors file."""
BATCH = 4
TOKENS = 40
"""Longest caption."""


class Captioner:
    """An image-to-text model that is ready to use; the same picture always gets the same caption."""

    def __init__(self, model: Any, processor: Any) -> None:
        self.model, self.processor = model, processor

    @torch.no_grad()
    def __call__(self, pictures: Sequence[Image.Image]) -> list[str]:
        """One caption for each picture; transparent parts are white."""
        captions: list[str] = []
        for start in range(0, len(pictures), BATCH):
            flat = [_on_white(picture) for picture in pictures[start : start + BATCH]]
            pixels = self.processor(images=flat, return_tensors="pt")["pixel_values"].to(self.model.device)
            answers = self.model.generate(pixel_values=pixels, max_new_tokens=TOKENS, num_beams=3, do_sample=False)
            captions += [text.strip() for text in self.processor.batch_decode(answers, skip_special_tokens=True)]
        return captions


def load_captioner(source: str | Path = MODEL, device: torch.device | str = "cpu") -> Captioner:
    """The model from the hub's cache, the hub, or a folder. Raises InvalidRequest where it is in none of them."""
    from transformers import BlipForConditionalGeneration, BlipProcessor

    revision = REVISION if source == MODEL else "main"
    options: dict[str, Any] = {"revision": revision, "trust_remote_code": False}
    try:
        processor = BlipProcessor.from_pretrained(source, **options)
        model = BlipForConditionalGeneration.from_pretrained(source, use_safetensors=True, **options)
    except (OSError, ValueError) as error:
        raise InvalidRequest(
            f"Captions are made by {source}, which was found neither on this machine nor on the model hub: connect to "
            "huggingface.co once, or write the captions yourself, into a .txt file beside each picture."
        ) from error
    return Captioner(model.to(device).eval(), processor)  # type: ignore[arg-type]


def _on_white(picture: Image.Image) -> Image.Image:
    rgba = picture.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")
