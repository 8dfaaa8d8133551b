"""Shards of drawn scenes: any process may add one, trainings read what is there already."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from training.base.scenes import random_scene

SHARD = 4000


def write_shard(folder: Path, index: int, things: Mapping[str, np.ndarray], size: int) -> None:
    """Draw ``SHARD`` scenes with seed ``index``; the captions file appears last and makes the shard whole."""
    done = folder / f"{index:05d}.json"
    if done.exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng((index, 5))
    scenes = [random_scene(things, size, rng) for _ in range(SHARD)]
    np.save(folder / f"{index:05d}.npy", np.stack([scene.image for scene in scenes]))
    records = [{"caption": s.caption, "names": [thing.name for thing in s.things]} for s in scenes]
    temporary = done.with_suffix(f".{os.getpid()}.tmp")
    temporary.write_text(json.dumps(records))
    os.replace(temporary, done)


@dataclass
class ScenePool:
    """All whole shards of a folder, pictures memory-mapped; ``refresh`` returns the shards that are new."""

    folder: Path
    pictures: list[np.ndarray] = field(default_factory=list)
    captions: list[str] = field(default_factory=list)
    names: list[list[str]] = field(default_factory=list)
    _seen: set[str] = field(default_factory=set)

    def refresh(self) -> list[np.ndarray]:
        """Read new shards; each is (SHARD, H, W, 3) uint8."""
        new = []
        for path in sorted(self.folder.glob("*.json")):
            if path.name in self._seen:
                continue
            records = json.loads(path.read_text())
            new.append(np.load(path.with_suffix(".npy"), mmap_mode="r"))
            self.captions += [record["caption"] for record in records]
            self.names += [record["names"] for record in records]
            self._seen.add(path.name)
        self.pictures += new
        return new

    def take(self, index: np.ndarray) -> np.ndarray:
        """(B, H, W, 3) uint8 pictures of the given indices."""
        return np.stack([self.pictures[i // SHARD][i % SHARD] for i in index])
