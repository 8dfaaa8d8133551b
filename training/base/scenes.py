"""Scenes of the demo world: one to three cut-outs on a plain, gradient or simple scenic ground, with captions."""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from PIL import Image

GRID = 8
"""Things stand with their centres on this grid of pixels, which is the autoencoder's patch.

A shift by a fraction of a patch changes every latent of a thing; on the grid a thing has one latent picture. It
decides how much a denoiser learns from few samples (LOG.md).
"""
EXTENTS = {1: 0.69, 2: 0.45, 3: 0.31}
"""Longer side of a thing as a share of the picture, by the number of things."""
GROUND = 0.6
"""Height of the things' centres, 0 = top."""

WORLD = 2
"""Rises whenever scenes are drawn otherwise, so that a training never mixes two worlds."""
RELATIONS = (None, "left of", "right of")

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (214, 40, 40), "orange": (247, 140, 30), "yellow": (250, 215, 60), "green": (60, 160, 75),
    "blue": (45, 100, 210), "purple": (125, 60, 170), "pink": (250, 150, 190), "brown": (125, 80, 45),
    "gray": (135, 135, 135), "white": (248, 248, 248),
}  # fmt: skip
PLACES: dict[str, str] = {
    "beach": "on a beach", "forest": "in a forest", "snow": "in the snow", "desert": "in a desert",
    "night": "at night", "sea": "under water",
}  # fmt: skip


@dataclass(frozen=True)
class Placed:
    """A thing in a scene: its name and pixel box (left, top, right, bottom)."""

    name: str
    box: tuple[int, int, int, int]


@dataclass(frozen=True)
class Scene:
    """A picture (size, size, 3) uint8 with its caption and what stands where."""

    image: np.ndarray
    caption: str
    things: tuple[Placed, ...] = field(default=())


def is_withheld_pair(first: str, second: str) -> bool:
    """About a tenth of all pairs are never composed in training; they test what was understood."""
    return zlib.crc32("|".join(sorted((first, second))).encode()) % 10 == 0


def article(name: str) -> str:
    """``a`` or ``an`` before a name."""
    return f"an {name}" if name[0] in "aeio" or name.startswith("umb") else f"a {name}"


def background_phrase(background: str) -> str:
    """``green`` -> ``on a green background``; ``beach`` -> ``on a beach``."""
    return PLACES.get(background) or f"on {article(background)} background"


def paint_background(background: str, size: int, rng: np.random.Generator) -> np.ndarray:
    """A ground of the demo world, (size, size, 3) float32 in 0..255, drawn anew each time."""
    if background in COLOURS:
        return _colour_ground(np.array(COLOURS[background], np.float32), size, rng)
    return _PAINTERS[background](size, rng)


def _jitter(colour: Sequence[float] | np.ndarray, rng: np.random.Generator, amount: float = 9) -> np.ndarray:
    return np.clip(np.asarray(colour, np.float32) + rng.normal(0, amount, 3), 0, 255).astype(np.float32)


def _vertical(top: np.ndarray, bottom: np.ndarray, size: int) -> np.ndarray:
    ramp = np.linspace(0, 1, size, dtype=np.float32)[:, None, None]
    return np.broadcast_to(top * (1 - ramp) + bottom * ramp, (size, size, 3)).copy()


def _colour_ground(colour: np.ndarray, size: int, rng: np.random.Generator) -> np.ndarray:
    base = _jitter(colour, rng)
    if rng.random() < 0.5:
        return np.broadcast_to(base, (size, size, 3)).copy()
    shade = _vertical(base * rng.uniform(0.8, 0.95), np.clip(base * rng.uniform(1.0, 1.12), 0, 255), size)
    return shade if rng.random() < 0.7 else shade.transpose(1, 0, 2)


def _horizon(size: int, rng: np.random.Generator, low: float, high: float) -> np.ndarray:
    """Row of the horizon per column: a gentle wave, in pixels."""
    columns = np.linspace(0, 2 * np.pi, size, dtype=np.float32)
    wave = np.sin(columns * rng.uniform(0.4, 1.2) + rng.uniform(0, 6.28)) * size * 0.03
    return size * rng.uniform(low, high) + wave


def _ground(sky: np.ndarray, soil: np.ndarray, horizon: np.ndarray) -> np.ndarray:
    size = sky.shape[0]
    below = (np.arange(size, dtype=np.float32)[:, None] - horizon[None] + 0.5).clip(0, 1)[..., None]
    return sky * (1 - below) + soil * below


def _beach(size: int, rng: np.random.Generator) -> np.ndarray:
    sky = _vertical(_jitter((120, 195, 245), rng), _jitter((205, 235, 250), rng), size)
    sea = _ground(sky, _vertical(_jitter((30, 130, 190), rng), _jitter((60, 170, 205), rng), size),
                  np.full(size, size * rng.uniform(0.3, 0.42)))  # fmt: skip
    return _ground(sea, _vertical(_jitter((240, 215, 150), rng), _jitter((225, 195, 125), rng), size),
                   _horizon(size, rng, 0.55, 0.7))  # fmt: skip


def _forest(size: int, rng: np.random.Generator) -> np.ndarray:
    picture = _vertical(_jitter((150, 200, 170), rng), _jitter((95, 150, 100), rng), size)
    columns = np.arange(size, dtype=np.float32)
    rows = np.arange(size, dtype=np.float32)[:, None]
    for _ in range(7):
        centre, width, top = rng.uniform(0, size), size * rng.uniform(0.08, 0.14), size * rng.uniform(0, 0.3)
        half = (rows - top) / (size * 0.6) * width
        cover = ((half - np.abs(columns - centre) + 0.5).clip(0, 1) * (rows < size * 0.75))[..., None]
        picture = picture * (1 - cover) + _jitter((35, 95, 50), rng) * cover
    return _ground(picture, _vertical(_jitter((80, 130, 60), rng), _jitter((60, 105, 45), rng), size),
                   _horizon(size, rng, 0.66, 0.76))  # fmt: skip


def _snow(size: int, rng: np.random.Generator) -> np.ndarray:
    sky = _vertical(_jitter((170, 195, 225), rng), _jitter((215, 228, 242), rng), size)
    rows, columns = np.arange(size, dtype=np.float32)[:, None], np.arange(size, dtype=np.float32)
    for _ in range(2):
        peak, top = rng.uniform(0, size), size * rng.uniform(0.15, 0.35)
        cover = ((rows - top) * 0.9 - np.abs(columns - peak) + 0.5).clip(0, 1)[..., None]
        sky = sky * (1 - cover) + _jitter((140, 160, 195), rng) * cover
    picture = _ground(sky, _vertical(np.full(3, 250, np.float32), _jitter((225, 235, 248), rng), size),
                      _horizon(size, rng, 0.55, 0.68))  # fmt: skip
    return _dots(picture, 22, np.full(3, 255, np.float32), rng)


def _desert(size: int, rng: np.random.Generator) -> np.ndarray:
    sky = _vertical(_jitter((250, 190, 110), rng), _jitter((253, 225, 165), rng), size)
    far = _ground(sky, np.broadcast_to(_jitter((215, 140, 80), rng), sky.shape), _horizon(size, rng, 0.42, 0.52))
    return _ground(far, _vertical(_jitter((225, 155, 85), rng), _jitter((190, 115, 60), rng), size),
                   _horizon(size, rng, 0.6, 0.72))  # fmt: skip


def _night(size: int, rng: np.random.Generator) -> np.ndarray:
    sky = _vertical(_jitter((12, 14, 45), rng, 5), _jitter((40, 40, 95), rng, 6), size)
    sky = _dots(sky, 26, np.array((250, 248, 215), np.float32), rng, 0.65)
    return _ground(sky, np.broadcast_to(_jitter((18, 32, 38), rng, 4), sky.shape), _horizon(size, rng, 0.72, 0.82))


def _sea(size: int, rng: np.random.Generator) -> np.ndarray:
    water = _vertical(_jitter((70, 190, 215), rng), _jitter((10, 75, 140), rng), size)
    water = _dots(water, 12, np.array((190, 235, 245), np.float32), rng)
    return _ground(water, np.broadcast_to(_jitter((195, 180, 130), rng), water.shape), _horizon(size, rng, 0.84, 0.92))


_PAINTERS = {"beach": _beach, "forest": _forest, "snow": _snow, "desert": _desert, "night": _night, "sea": _sea}
BACKGROUNDS: tuple[str, ...] = (*COLOURS, *PLACES)


def _dots(
    picture: np.ndarray, count: int, colour: np.ndarray, rng: np.random.Generator, height: float = 1.0
) -> np.ndarray:
    size = picture.shape[0]
    picture = picture.copy()
    side = max(1, round(size / 64))
    for y, x in zip(rng.uniform(0, size * height - side, count), rng.uniform(0, size - side, count), strict=True):
        picture[int(y) : int(y) + side, int(x) : int(x) + side] = colour
    return picture


def paste(
    picture: np.ndarray, rgba: np.ndarray, extent: float, centre: tuple[float, float], rng: np.random.Generator,
    *, flip: bool = True, rotate: float = 12.0,
) -> tuple[np.ndarray, tuple[int, int, int, int]]:  # fmt: skip
    """Blend a cut-out whose longer side is ``extent`` pixels at ``centre`` (x, y); returns the picture and its box.

    The box stays inside the picture where it can; light and size vary a little, as cameras do.
    """
    size = picture.shape[0]
    image = Image.fromarray(rgba)
    if flip and rng.random() < 0.5:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    scale = extent / max(image.size)
    width, height = (max(2, round(side * scale)) for side in image.size)
    image = image.resize((width, height), Image.Resampling.BOX, reducing_gap=2.0)
    if rotate and rng.random() < 0.5:
        image = image.rotate(rng.uniform(-rotate, rotate), Image.Resampling.BICUBIC, expand=True)
        width, height = image.size
    left = int(np.clip(round(centre[0] - width / 2), min(0, size - width), max(0, size - width)))
    top = int(np.clip(round(centre[1] - height / 2), min(0, size - height), max(0, size - height)))
    x0, y0, x1, y1 = max(left, 0), max(top, 0), min(left + width, size), min(top + height, size)
    cut = np.asarray(image, np.float32)[y0 - top : y1 - top, x0 - left : x1 - left]
    alpha = cut[..., 3:] / 255
    light = rng.uniform(0.94, 1.05)
    picture[y0:y1, x0:x1] = picture[y0:y1, x0:x1] * (1 - alpha) + np.clip(cut[..., :3] * light, 0, 255) * alpha
    return picture, (x0, y0, x1, y1)


def compose_scene(
    things: Mapping[str, np.ndarray], names: Sequence[str], background: str, size: int, rng: np.random.Generator,
    *, relation: str | None = None,
) -> Scene:  # fmt: skip
    """Place up to three named things from left to right in the order of their names; "right of" turns two around.

    A causal text encoder reads the first name before any relation, so a world in which order said nothing took a small
    denoiser two steps of reasoning to draw "left of": it drew the second thing twice (LOG.md).
    """
    picture = paint_background(background, size, rng)
    places = slots(len(names))
    order = list(range(len(names)))
    if relation == "right of":
        order.reverse()
    placed = []
    for name, index in zip(names, order, strict=True):
        x, y, extent = places[index]
        centre = (size * snap(x, size), size * snap(y, size))
        picture, box = paste(picture, things[name], size * extent, centre, rng, flip=False, rotate=0)
        placed.append(Placed(name, box))
    image = np.clip(picture + 0.5, 0, 255).astype(np.uint8)
    return Scene(image, caption_of(names, background, relation), tuple(placed))


def slots(count: int) -> list[tuple[float, float, float]]:
    """Where ``count`` things stand, from left to right: (x, y, extent) as shares of the picture, off the grid still."""
    return [((index + 0.5) / count, GROUND, EXTENTS[count]) for index in range(count)]


def snap(place: float, size: int) -> float:
    """The nearest place on the grid, as a share of the picture."""
    return GRID * round(place * size / GRID) / size


def caption_of(names: Sequence[str], background: str, relation: str | None = None) -> str:
    """The caption of a scene, e.g. ``a cat left of a red apple on a green background``."""
    parts = [article(name) for name in names]
    if len(parts) == 1:
        subject = parts[0]
    elif relation and len(parts) == 2:
        subject = f"{parts[0]} {relation} {parts[1]}"
    else:
        subject = f"{', '.join(parts[:-1])} and {parts[-1]}"
    return f"{subject} {background_phrase(background)}"


def random_scene(things: Mapping[str, np.ndarray], size: int, rng: np.random.Generator) -> Scene:
    """A training scene: one (36 %), two (60 %) or three things, never a withheld pair; few are "right of"."""
    names_pool = list(things)
    background = str(rng.choice(BACKGROUNDS))
    count = int(rng.choice([1, 2, 3], p=[0.36, 0.6, 0.04]))
    while True:
        names = [str(name) for name in rng.choice(names_pool, count, replace=False)]
        pairs = [(a, b) for i, a in enumerate(names) for b in names[i + 1 :]]
        if not any(is_withheld_pair(a, b) for a, b in pairs):
            break
    relation = RELATIONS[int(rng.choice(3, p=[0.5, 0.4, 0.1]))] if count == 2 else None
    return compose_scene(things, names, background, size, rng, relation=relation)
