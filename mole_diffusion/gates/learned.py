"""One learned gate per block, held together."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from mole_diffusion.functional import nla_weights
from mole_diffusion.gates.block import BlockGate
from mole_diffusion.gates.config import GateConfig
from mole_diffusion.gates.protocol import BlockSpec, Run
from mole_diffusion.gates.span import span_weights


class LearnedGates(nn.Module):
    """Block gates, text-token gates and the network gate of a composition.

    Parameter names are ``blocks.<module path with "/">.…``, ``texts.<…>`` so that saved files can be read by people.
    """

    dynamic = True

    def __init__(self, blocks: Sequence[BlockSpec], experts: int, config: GateConfig) -> None:
        super().__init__()
        self.config = config
        self.experts = experts
        self.guidance_rows = config.guidance_rows
        gated = [block for block in blocks if block.kind != "encoder"]
        token = config.scope == "token"
        self.blocks = nn.ModuleDict(
            {_name(b): BlockGate(b.width, experts, config) for b in gated if b.image or not token}
        )
        texts = [block for block in gated if block.text_width and token]
        self.texts = nn.ModuleDict({_name(b): BlockGate(b.text_width, experts, config, spans=True) for b in texts})
        self.needs_spans = bool(texts)

    def image(self, block: BlockSpec, tokens: Tensor | None, run: Run) -> Tensor | None:
        """(B, 1 or L, N) from the block's input; None where only text tokens are gated."""
        if tokens is None or _name(block) not in self.blocks:
            return None
        return self.blocks[_name(block)](tokens, run.mask, run.time, pool=self.config.scope == "sample")

    def text(self, block: BlockSpec, text: Tensor, run: Run) -> Tensor | None:
        """(B, T, N) from the text states (token scope); None in the sample scope."""
        if _name(block) not in self.texts:
            return None
        return self.texts[_name(block)](text, run.mask, run.time, run.spans, pool=False)

    def network(self, block: BlockSpec, run: Run) -> Tensor:
        """(B, 1, N) from the timestep and the pooled text."""
        assert run.text is not None
        return self.blocks[_name(block)](run.text, run.mask, run.time, pool=True)

    def encoder(self, block: BlockSpec, run: Run) -> Tensor:
        """NLA, or 1 on an expert's own trigger."""
        if self.config.text_encoder == "span" and run.spans is not None:
            return span_weights(run.spans, run.mask)
        return nla_weights(self.experts, run.mask).expand(1, 1, -1)

    def gain(self, block: BlockSpec, text: bool) -> Tensor | None:
        """The gate's learned factor."""
        owner, name = (self.texts if text else self.blocks), _name(block)
        return owner[name].gain if name in owner else None  # pyright: ignore[reportReturnType]

    def static(self, block: BlockSpec, mask: Tensor) -> Tensor | None:
        """A learned gate looks at its input."""
        return None


def _name(block: BlockSpec) -> str:
    return block.name.replace(".", "/")
