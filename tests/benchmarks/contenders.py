"""The contenders of one comparison: each has modules of its own, all share the base's weights but the merged one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch._dynamo.exc import TorchDynamoException

from mole_diffusion import Composition, GateConfig, compose
from mole_diffusion.experts import Expert
from mole_diffusion.gates import nla
from tests.benchmarks import paper_gate, peers
from tests.benchmarks.sizes import Stage

XLORA_LIMIT = 16
PAPER_LIMIT = 8
PAPER_BYTES = 4 * 2**30


class Skipped(Exception):
    """This contender does not run with this number of experts; the text says why."""


@dataclass(frozen=True)
class Contender:
    """One way to run the UNet with N experts.

    Attributes:
        call: one UNet call.
        gates: parameters that start at uniform weights; filled with random numbers before anything is timed.
        undo: takes the experts off again; None where the UNet is thrown away instead.
        bare: the UNet call after ``undo``, to be compared with the base.
        aside: bytes that only the comparison needs.
    """

    call: Callable[[], Tensor]
    gates: Sequence[nn.Parameter] = ()
    undo: Callable[[], None] | None = None
    bare: Callable[[], Tensor] | None = None
    aside: int = 0

    def randomise(self, seed: int) -> None:
        """Leave the initial state, where all gates are uniform."""
        random = torch.Generator().manual_seed(seed)
        for parameter in self.gates:
            parameter.data += torch.randn(parameter.shape, generator=random).to(parameter) * 0.1


def base(stage: Stage, experts: Sequence[Expert]) -> Contender:
    """The UNet alone."""
    unet = stage.twin().unet
    return Contender(lambda: stage.call(unet))


def merged(stage: Stage, experts: Sequence[Expert]) -> Contender:
    """Static NLA, merged into the weights."""
    pipe = stage.twin(own_weights=True)
    composition = compose(pipe, experts, gate=nla(len(experts))).attach()
    composition.merge()
    copied = sum(parameter.nbytes for parameter in stage.pipe.unet.parameters())
    return replace(_ours(stage, pipe, composition), aside=copied)


def peft(stage: Stage, experts: Sequence[Expert]) -> Contender:
    """diffusers' ``set_adapters`` with 1/N each."""
    unet = stage.twin().unet
    peers.set_nla(unet, peers.load_adapters(unet, experts))
    return Contender(lambda: stage.call(unet))


def xlora(stage: Stage, experts: Sequence[Expert]) -> Contender:
    """Two passes through PEFT's layers, the second one with scalings per row."""
    if len(experts) > XLORA_LIMIT:
        raise Skipped(f"not run beyond {XLORA_LIMIT} experts: two of PEFT's passes, one product per expert and layer")
    unet = stage.twin().unet
    peers.set_nla(unet, peers.load_adapters(unet, experts))
    run, classifier = peers.two_passes(unet, lambda: stage.call(unet))
    return Contender(run, list(classifier.parameters()))


def paper(stage: Stage, experts: Sequence[Expert]) -> Contender:
    """The paper's gate to the letter."""
    count = len(experts)
    if count > PAPER_LIMIT:
        raise Skipped(f"not run beyond {PAPER_LIMIT} experts: N + 1 passes through every block")
    unet = stage.twin().unet
    shapes = paper_gate.block_shapes(unet, lambda: stage.call(unet))
    size = paper_gate.gate_elements(shapes, count) * stage.dtype.itemsize
    if size > PAPER_BYTES:
        raise Skipped(f"its gates of N²·L·d numbers take {size / 2**30:.0f} GiB, the limit is {PAPER_BYTES // 2**30}")
    paper_gate.install(unet, experts, shapes)
    return Contender(lambda: stage.call(unet))


def ours_sample(stage: Stage, experts: Sequence[Expert], *, compiled: bool = False) -> Contender:
    """Learned block gates, one weight per expert and row."""
    return _gated(stage, experts, GateConfig(scope="sample"), compiled)


def ours_token(stage: Stage, experts: Sequence[Expert], *, compiled: bool = False) -> Contender:
    """Learned block gates, one weight per expert and token."""
    return _gated(stage, experts, GateConfig(scope="token"), compiled)


def compiled_base(stage: Stage, experts: Sequence[Expert]) -> Contender:
    """The UNet alone under ``torch.compile``."""
    unet = _compiled(stage, stage.twin().unet)
    return Contender(lambda: stage.call(unet))


def compiled_sample(stage: Stage, experts: Sequence[Expert]) -> Contender:
    """Sample gates under ``torch.compile``."""
    return ours_sample(stage, experts, compiled=True)


def compiled_token(stage: Stage, experts: Sequence[Expert]) -> Contender:
    """Token gates under ``torch.compile``."""
    return ours_token(stage, experts, compiled=True)


def _gated(stage: Stage, experts: Sequence[Expert], config: GateConfig, compiled: bool) -> Contender:
    pipe = stage.twin()
    composition = compose(pipe, experts, gate=config).attach()
    composition.condition(None, guidance=True)
    return _ours(stage, pipe, composition, compiled)


def _ours(stage: Stage, pipe: Any, composition: Composition, compiled: bool = False) -> Contender:
    unet = _compiled(stage, pipe.unet) if compiled else pipe.unet
    gates = list(composition.parameters())
    return Contender(lambda: stage.call(unet), gates, composition.detach, lambda: stage.call(pipe.unet))


def _compiled(stage: Stage, unet: Any) -> Any:
    made = torch.compile(unet)
    try:
        stage.call(made)
    except TorchDynamoException as error:
        raise Skipped(f"torch.compile failed: {str(error).splitlines()[0]}") from error
    return made


Maker = Callable[[Stage, Sequence[Expert]], Contender]
CONTENDERS: dict[str, Maker] = {
    "base": base,
    "merged": merged,
    "peft": peft,
    "xlora": xlora,
    "paper": paper,
    "ours_sample": ours_sample,
    "ours_token": ours_token,
}
COMPILED: dict[str, Maker] = {
    "compiled_base": compiled_base,
    "compiled_sample": compiled_sample,
    "compiled_token": compiled_token,
}
