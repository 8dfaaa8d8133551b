"""The training-free gate: an expert owns the text tokens of its trigger."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mole_diffusion.functional import nla_weights
from mole_diffusion.gates.config import TriggerSpans
from mole_diffusion.gates.protocol import BlockSpec, Looks, Run, Sight, Total


def span_weights(spans: Tensor, mask: Tensor) -> Tensor:
    """1 for an expert on its own trigger, 0 for the others there; NLA elsewhere.

    Tokens that belong to several triggers are shared equally.

    Args:
        spans: (B, T, N) bool.
        mask: (N,) or (B, 1, N) bool, True = active; the trigger of a masked expert is an ordinary word.

    Returns:
        (B, T, N) fp32.
    """
    own = (spans & mask).float()
    claimed = own.sum(-1, keepdim=True)
    return torch.where(claimed > 0, own / claimed.clamp_min(1.0), nla_weights(mask.shape[-1], mask).expand_as(own))


def nla_rows(run: Run) -> Tensor:
    """NLA over the active experts, (1 or rows, 1, N)."""
    weights = nla_weights(run.experts, run.mask)
    return weights if weights.ndim == 3 else weights.expand(1, 1, -1)


class SpanGate(nn.Module):
    """See :class:`mole_diffusion.gates.TriggerSpans`."""

    looks: Looks = "nothing"
    needs_spans = True
    pools = False
    total: Total = "share"

    def __init__(self, experts: int, config: TriggerSpans) -> None:
        super().__init__()
        self.experts = experts
        self.guidance_rows = config.guidance_rows

    def image(self, block: BlockSpec, sight: Sight | None, run: Run) -> Tensor | None:
        """NLA."""
        return None

    def text(self, block: BlockSpec, sight: Sight, run: Run) -> Tensor | None:
        """By trigger spans."""
        assert run.spans is not None
        return span_weights(run.spans, run.mask)

    def network(self, block: BlockSpec, run: Run) -> Tensor:
        """NLA."""
        return nla_rows(run)

    def encoder(self, block: BlockSpec, run: Run) -> Tensor:
        """By trigger spans of the encoder's own input."""
        assert run.spans is not None
        return span_weights(run.spans, run.mask)

    def gain(self, block: BlockSpec, text: bool) -> Tensor | None:
        """None."""
        return None

    def static(self, block: BlockSpec, mask: Tensor) -> Tensor | None:
        """The prompt decides."""
        return None
