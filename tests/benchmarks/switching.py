"""How long it takes to put experts on, to exchange them, to mask them, and to read them from files: ours and PEFT."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from mole_diffusion import Composition, compose
from mole_diffusion.experts import Expert
from mole_diffusion.experts.save import save_expert
from tests.benchmarks import peers
from tests.benchmarks.measure import seconds
from tests.benchmarks.sizes import Stage
from tests.core.small import shapes_of

MANY = 16
NAMES = ("attach", "switch", "mask", "disk")
FIELDS = (*(f"{name}{end}" for name in NAMES for end in ("_s", "_call_s")), "call_s", "disk_s_per_100mb")


class Ours:
    """Compositions with sample gates on one pipeline."""

    def __init__(self, stage: Stage) -> None:
        self.pipe = stage.twin()
        self.unet = self.pipe.unet
        self.shapes = shapes_of(self.pipe)
        self.on: Composition | None = None

    def attach(self, experts: Sequence[Expert]) -> None:
        self.on = compose(self.pipe, experts).attach()
        self.on.condition(None, guidance=True)

    def detach(self) -> None:
        assert self.on is not None
        self.on.detach()

    def mask(self, names: Sequence[str]) -> None:
        assert self.on is not None
        self.on.mask(*names)

    def read(self, files: Sequence[Path]) -> None:
        self.attach([Expert.load(file, name=file.stem, shapes=self.shapes) for file in files])


class Peft:
    """Adapters of diffusers and PEFT on one UNet."""

    def __init__(self, stage: Stage) -> None:
        self.unet = stage.twin().unet
        self.names: list[str] = []

    def attach(self, experts: Sequence[Expert]) -> None:
        self.names = peers.load_adapters(self.unet, experts)
        peers.set_nla(self.unet, self.names)

    def detach(self) -> None:
        self.unet.unload_lora()

    def mask(self, names: Sequence[str]) -> None:
        peers.set_nla(self.unet, [name for name in self.names if name not in names])

    def read(self, files: Sequence[Path]) -> None:
        for file in files:
            peers.load_adapter(
                self.unet,
                str(file.parent),
                weight_name=file.name,
                adapter_name=file.stem,
                prefix="unet",
                use_safetensors=True,
                local_files_only=True,
            )
        peers.settle(self.unet)
        self.names = [file.stem for file in files]
        peers.set_nla(self.unet, self.names)


def switching(stage: Stage, counts: Sequence[int]) -> Iterator[dict[str, Any]]:
    """One row per tool and number of experts; medians.

    ``attach_s``: experts that are in memory onto a bare UNet. ``switch_s``: off, and as many others on. ``mask_s``:
    two thirds of the attached experts off (never all). ``disk_s``: from files that the system has in its cache, onto a
    bare UNet. ``*_call_s``: the first UNet call afterwards, where work may hide that was put off; ``call_s``: a later
    one.
    """
    for count in counts:
        experts = stage.experts(2 * count)
        with TemporaryDirectory() as folder:
            files = [save_expert(expert, Path(folder) / f"{expert.name}.safetensors") for expert in experts[:count]]
            for name, tool in (("ours", Ours), ("peft", Peft)):
                yield {"tool": name, "n": count, **_one(stage, tool(stage), experts, files)}


def _one(stage: Stage, tool: Ours | Peft, experts: Sequence[Expert], files: Sequence[Path]) -> dict[str, Any]:
    first, second = experts[: len(files)], experts[len(files) :]
    repeats = 3 if len(files) < MANY else 1
    megabytes = sum(file.stat().st_size for file in files) / 1e6
    off = [expert.name for expert in first[max(1, len(files) // 3) :]]  # PEFT cannot run without any
    times: dict[str, list[float]] = {}

    def clock(field: str, work: Callable[[], Any]) -> None:
        times.setdefault(field, []).append(seconds(work, stage.device))

    def timed(name: str, work: Callable[[], Any]) -> None:
        clock(f"{name}_s", work)
        clock(f"{name}_call_s", lambda: stage.call(tool.unet))

    def exchange() -> None:
        tool.detach()
        tool.attach(second)

    for _ in range(repeats):
        timed("attach", lambda: tool.attach(first))
        timed("mask", lambda: tool.mask(off))
        timed("switch", exchange)
        clock("call_s", lambda: stage.call(tool.unet))
        tool.detach()
        timed("disk", lambda: tool.read(files))
        tool.detach()
    found = {field: statistics.median(values) for field, values in times.items()}
    per_100mb = found["disk_s"] * 100 / megabytes
    return {**found, "disk_s_per_100mb": per_100mb, "disk_mb": megabytes, "repeats": repeats}
