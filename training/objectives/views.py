"""Cut-outs as scorers take them."""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image
from torch import Tensor


def as_tensor(view: Image.Image) -> Tensor:
    """An RGBA cut-out as (4, H, W) in 0…1."""
    return torch.from_numpy(np.asarray(view.convert("RGBA"), np.float32) / 255).permute(2, 0, 1)
