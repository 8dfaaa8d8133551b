"""One learned gate per place, held together."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from mole_diffusion.gates.block import BlockGate
from mole_diffusion.gates.config import GateConfig
from mole_diffusion.gates.features import energies
from mole_diffusion.gates.flattened import FlattenedGate
from mole_diffusion.gates.protocol import BlockSpec, Looks, Run, Sight, Total
from mole_diffusion.gates.span import nla_rows, span_weights

_LOOKS: dict[str, Looks] = {"hidden": "entry", "energy": "site", "expert_outputs": "outputs", "flattened": "outputs"}


class LearnedGates(nn.Module):
    """Block gates, text-token gates and the network gate of a composition.

    Parameter names are ``blocks.<module path with "/">.…``, ``texts.<…>`` so that saved files can be read by people.
    """

    def __init__(self, blocks: Sequence[BlockSpec], experts: int, config: GateConfig) -> None:
        super().__init__()
        self.config = config
        self.experts = experts
        self.guidance_rows = config.guidance_rows
        self.total: Total = "odds" if config.scale == "sigmoid" else "share"
        self.looks: Looks = "site" if config.granularity == "matrix" else _LOOKS[config.input]
        gated = [block for block in blocks if block.kind != "encoder"]
        token = config.scope == "token"
        self.blocks = nn.ModuleDict({_name(b): self._gate(b) for b in gated if b.image or not token})
        texts = [block for block in gated if block.text_width and token]
        self.texts = nn.ModuleDict({_name(b): BlockGate(b.text_width, experts, config, spans=True) for b in texts})
        self.needs_spans = bool(texts)
        self.pools = not token

    def image(self, block: BlockSpec, sight: Sight | None, run: Run) -> Tensor | None:
        """(B, 1 or L, N) from the block's input; None where only text tokens are gated."""
        if sight is None or _name(block) not in self.blocks:
            return None
        pool = self.config.scope == "sample"
        features = self._features(sight, run)
        return self.blocks[_name(block)](features, run.mask, run.time, pool=pool, places=sight.places)

    def text(self, block: BlockSpec, sight: Sight, run: Run) -> Tensor | None:
        """(B, T, N) from the text states (token scope); None in the sample scope."""
        if _name(block) not in self.texts:
            return None
        return self.texts[_name(block)](sight.hidden, run.mask, run.time, run.spans, pool=False)

    def network(self, block: BlockSpec, run: Run) -> Tensor:
        """(B, 1, N) from the timestep and the pooled text; from the timestep alone where no text is given."""
        gate = self.blocks[_name(block)]
        rows = run.time.shape[0] if run.time is not None else 1
        text = next(gate.parameters()).new_zeros(rows, 1, max(block.width, 1)) if run.text is None else run.text
        return gate(text, run.mask, run.time, pool=True, places=run.text_places)

    def encoder(self, block: BlockSpec, run: Run) -> Tensor:
        """NLA, or 1 on an expert's own trigger."""
        if self.config.text_encoder == "span" and run.spans is not None:
            return span_weights(run.spans, run.mask)
        return nla_rows(run)

    def gain(self, block: BlockSpec, text: bool) -> Tensor | None:
        """The gate's learned factor."""
        owner, name = (self.texts if text else self.blocks), _name(block)
        return owner[name].gain if name in owner else None  # pyright: ignore[reportReturnType]

    def static(self, block: BlockSpec, mask: Tensor) -> Tensor | None:
        """A learned gate looks at its input."""
        return None

    def _gate(self, block: BlockSpec) -> BlockGate | FlattenedGate:
        if block.kind == "network" or self.config.input == "hidden":
            return BlockGate(max(block.width, 1), self.experts, self.config)
        if self.config.input == "energy":
            return BlockGate(self.experts, self.experts, self.config, normalise=False)
        if self.config.input == "flattened":
            return FlattenedGate(block, self.experts, self.config)
        width = self.experts * (block.out_width or block.width)
        return BlockGate(width, self.experts, self.config, normalise=False)

    def _features(self, sight: Sight, run: Run) -> Tensor:
        if self.config.input == "energy":
            assert sight.down is not None and sight.bank is not None
            return energies(sight.down, sight.bank, self.experts)
        return sight.hidden if sight.outputs is None else sight.outputs


def _name(block: BlockSpec) -> str:
    return block.name.replace(".", "/") or "all"
