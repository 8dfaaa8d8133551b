"""Masks for pictures that have none: what differs from the border, or where the trigger's attention is."""

from __future__ import annotations

import numpy as np
from PIL import Image
from scipy import ndimage

AREA = (0.05, 0.70)
"""A subject's plausible share of its picture."""
TOUCHING = 0.35
"""A mask that covers more of the picture's border than this is background."""


def border_saliency(picture: Image.Image) -> np.ndarray:
    """Distance (H, W), 0…1, of each pixel from the plane of colours that fits the picture's border."""
    pixels = np.asarray(picture.convert("RGB"), np.float32) / 255
    height, width = pixels.shape[:2]
    y, x = np.mgrid[0:height, 0:width].astype(np.float32)
    plane = np.stack([np.ones_like(x), x / width, y / height], -1)
    ring = _ring(height, width)
    fitted = plane @ _robust_fit(plane[ring], pixels[ring])
    distance = np.linalg.norm(pixels - fitted, axis=-1)
    return ndimage.gaussian_filter(distance, 0.01 * height) / np.sqrt(3)


def _robust_fit(inputs: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """Least squares, twice without the worst quarter: a subject that touches the border does not bend it."""
    kept = np.ones(len(inputs), bool)
    for _ in range(3):
        solution = np.linalg.lstsq(inputs[kept], targets[kept], rcond=None)[0]
        error = np.linalg.norm(inputs @ solution - targets, axis=-1)
        kept = error <= np.quantile(error, 0.75)
    return solution  # pyright: ignore[reportPossiblyUnbound]


def _ring(height: int, width: int) -> np.ndarray:
    thick = max(1, round(0.04 * min(height, width)))
    ring = np.ones((height, width), bool)
    ring[thick:-thick, thick:-thick] = False
    return ring


def threshold(heat: np.ndarray, floor: float = 0.0) -> np.ndarray:
    """The bright part of a heat map (H, W) as bool: Otsu's threshold, the main connected parts, holes filled."""
    mask = ndimage.binary_fill_holes(heat > max(otsu(heat), floor))
    labels, count = ndimage.label(mask)  # type: ignore[misc]
    if count == 0:
        return np.zeros(heat.shape, bool)
    sizes = ndimage.sum_labels(np.ones_like(labels), labels, np.arange(1, count + 1))
    return np.isin(labels, 1 + np.flatnonzero(sizes >= 0.15 * sizes.max()))


def otsu(values: np.ndarray, bins: int = 128) -> float:
    """The threshold that separates a histogram best (Otsu 1979)."""
    counts, edges = np.histogram(values, bins)
    centres = (edges[:-1] + edges[1:]) / 2
    below = np.cumsum(counts)
    above = below[-1] - below
    total = np.cumsum(counts * centres)
    with np.errstate(divide="ignore", invalid="ignore"):
        between = below * above * (total / below - (total[-1] - total) / above) ** 2
    return float(centres[int(np.nanargmax(between))]) if np.isfinite(between).any() else float(centres[-1])


def plausible(mask: np.ndarray) -> bool:
    """Whether a mask (H, W) may be one subject: 5–70 % of the picture and not most of its border."""
    ring = _ring(*mask.shape)
    return AREA[0] <= mask.mean() <= AREA[1] and mask[ring].mean() <= TOUCHING


def choose_mask(picture: Image.Image, attention: np.ndarray | None = None) -> np.ndarray | None:
    """The subject's mask (H, W), bool, or None.

    The border's saliency comes first; it must hold where the trigger's ``attention`` (H, W) is, if that is given.
    Else the attention itself decides.
    """
    salient = threshold(border_saliency(picture), floor=0.06)
    if plausible(salient) and (attention is None or attention[salient].mean() >= attention[~salient].mean()):
        return salient
    if attention is not None:
        attended = threshold(attention)
        if plausible(attended):
            return attended
    return None


def rough_mask(size: tuple[int, int], attention: np.ndarray | None) -> np.ndarray:
    """The third of a picture (W, H) nearest to where ``attention`` (H, W) is, or to its middle: bool (H, W)."""
    width, height = size
    y, x = np.mgrid[0:height, 0:width] + 0.5
    weight = np.ones((height, width)) if attention is None else np.maximum(attention - np.median(attention), 0) + 1e-9
    row, column = (weight * y).sum() / weight.sum(), (weight * x).sum() / weight.sum()
    distance = ((y - row) / height) ** 2 + ((x - column) / width) ** 2
    return distance <= np.quantile(distance, 1 / 3)


def cut_out(picture: Image.Image, mask: np.ndarray) -> Image.Image:
    """The picture as RGBA with a soft-edged mask."""
    soft = ndimage.gaussian_filter(mask.astype(np.float32), 0.6) * mask
    result = picture.convert("RGB").convert("RGBA")
    result.putalpha(Image.fromarray((soft * 255).astype(np.uint8)))
    return result
