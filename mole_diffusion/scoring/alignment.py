"""Image-text alignment: does the picture show what the text says. A score always carries the name of its model."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mole_diffusion.errors import InvalidFile, InvalidRequest
from mole_diffusion.scoring.preprocess import Preprocess

if TYPE_CHECKING:
    from mole_diffusion.bases.base import Base

_LOCAL = "local-dir:"
_REMEMBERED_TEXTS = 256


class AlignmentScorer:
    """Cosine similarity of pictures and texts under one image-text model of open_clip.

    Args:
        source: ``local-dir:<folder>`` (open_clip_config.json and safetensors weights), or ``<model>:<weights tag>``
            out of open_clip's list, fetched from the hub.
        label: how its scores are called, for example "demo CLIP" or "OpenCLIP ViT-B/32".
        device: where it runs, in float32.

    Raises:
        InvalidRequest: the folder or the hub cannot be read.
        InvalidFile: the folder has no safetensors weights, or they do not fit its configuration.
    """

    def __init__(self, source: str, label: str, *, device: torch.device | str = "cpu") -> None:
        model, self._tokenizer = _load(source, label)
        self.model: Any = model.requires_grad_(False).eval().to(device)
        self.preprocess = Preprocess.from_config(self.model.visual.preprocess_cfg)
        self.label = label
        self.source = source
        self._texts: OrderedDict[str, Tensor] = OrderedDict()

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return next(self.model.parameters()).device

    def score(self, images: Tensor, texts: Sequence[str]) -> Tensor:
        """Cosine of every picture (B, 3, H, W) in 0…1 with every text: (B, T) on the CPU."""
        with torch.no_grad():
            return (self.embed_images(images) @ self.embed_texts(texts).T).cpu()

    def embed_images(self, images: Tensor) -> Tensor:
        """Unit vectors (B, D) of pictures (B, 3, H, W) in 0…1, of any size; differentiable."""
        return F.normalize(self.model.encode_image(self.preprocess(images.to(self.device))).float(), dim=-1)

    def embed_texts(self, texts: Sequence[str]) -> Tensor:
        """Unit vectors (T, D) of texts; the last ones are remembered, for a prompt is scored at every step."""
        missing = [text for text in dict.fromkeys(texts) if text not in self._texts]
        if missing:
            with torch.no_grad():
                # One by one: in a batch the last bits of a vector would depend on what else was asked for.
                rows = [self.model.encode_text(self._tokenizer([text]).to(self.device)) for text in missing]
                vectors = torch.cat(rows).float()
            self._texts.update(zip(missing, F.normalize(vectors, dim=-1), strict=True))
        found = torch.stack([self._texts[text] for text in texts])
        while len(self._texts) > _REMEMBERED_TEXTS:
            self._texts.popitem(last=False)
        return found


def load_alignment(base: Base, device: torch.device | str = "cpu") -> AlignmentScorer:
    """The scorer that belongs to a base: its own small model for the demo, OpenCLIP ViT-B/32 for the large ones."""
    return AlignmentScorer(base.alignment_model, base.alignment_label, device=device)


def _load(source: str, label: str) -> tuple[Any, Any]:
    if source.startswith(_LOCAL):
        _check_folder(Path(source.removeprefix(_LOCAL)), label)
        name, tag = source, None
    else:
        name, _, tag = source.partition(":")
        _check_listed(name, tag, source)
    import open_clip

    try:
        return open_clip.create_model(name, pretrained=tag or None), open_clip.get_tokenizer(name)
    except (OSError, RuntimeError, ValueError) as error:
        raise _unreadable(source, label) from error


def _check_listed(name: str, tag: str, source: str) -> None:
    """open_clip would start at random without a tag, and read any file of the tag's name, pickles too."""
    from open_clip.pretrained import get_pretrained_cfg

    if not tag or not get_pretrained_cfg(name.replace("/", "-"), tag):
        raise InvalidRequest(
            f"{source!r} is no image-text model with weights: give local-dir:<folder>, or <model>:<tag> of open_clip."
        )


def _check_folder(folder: Path, label: str) -> None:
    if not (folder / "open_clip_config.json").is_file():
        raise InvalidRequest(f"The image-text model {label!r} is missing from {folder}: restore it to see scores.")
    if not any(folder.glob("*.safetensors")):
        raise InvalidFile(
            f"Expected safetensors weights of {label!r} in {folder}, found none; other kinds are refused."
        )


def _unreadable(source: str, label: str) -> Exception:
    if source.startswith(_LOCAL):
        return InvalidFile(f"The image-text model {label!r} in {source.removeprefix(_LOCAL)} is damaged: restore it.")
    return InvalidRequest(
        f"{label} ({source}) was found neither on this machine nor on the model hub: connect to huggingface.co once, "
        "or go on without scores."
    )
