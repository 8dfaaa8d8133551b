"""The gate of one block: LayerNorm → Linear → SiLU → Linear to N, with a learned temperature (Eq. 9-11).

The paper flattens the experts' outputs over all tokens, which fixes N and the resolution (``flattened.py``); its code
uses the block's own hidden state. This gate uses the hidden state, pooled over tokens for the sample scope, and works
at any size.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mole_diffusion.functional import null_gate, sigmoid_gate, softmax_gate
from mole_diffusion.gates.config import GateConfig

TIME_WIDTH = 64


class BlockGate(nn.Module):
    """Weights of N experts from features of width ``width``; the zeroed last layer makes it start at NLA.

    Args:
        width: channels of the features.
        experts: N.
        config: the gate's settings.
        spans: add a learned preference for an expert on the tokens of its own trigger.
        normalise: LayerNorm on the features first.
    """

    def __init__(
        self, width: int, experts: int, config: GateConfig, *, spans: bool = False, normalise: bool = True
    ) -> None:
        super().__init__()
        self.config = config
        self.experts = experts
        self.normalise = normalise
        self.down = nn.Linear(width, config.hidden)
        self.up = nn.Linear(config.hidden, experts + (config.scale == "null"))
        self.log_tau = nn.Parameter(torch.tensor(math.log(config.temperature)))
        self.time = nn.Linear(TIME_WIDTH, config.hidden, bias=False) if config.timestep else None
        self.gain = nn.Parameter(torch.ones(())) if config.gain else None
        self.span = nn.Parameter(torch.tensor(float(config.text_prior))) if spans else None
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)
        if self.time is not None:
            nn.init.zeros_(self.time.weight)

    def logits(
        self, features: Tensor, time: Tensor | None, spans: Tensor | None, pool: bool, places: Tensor | None = None
    ) -> Tensor:
        """ε before the temperature: (B, L or 1, N), one more for a null expert."""
        features = features.float()
        normed = F.layer_norm(features, features.shape[-1:]) if self.normalise else features
        hidden = self.down(pooled(normed, places) if pool else normed)
        if self.time is not None and time is not None:
            hidden = hidden + self.time(time).unsqueeze(1)
        logits = self.up(F.silu(hidden))
        if self.span is None or spans is None:
            return logits
        prior = F.pad(spans.float(), (0, logits.shape[-1] - self.experts))
        return logits + self.span * prior

    def forward(
        self,
        features: Tensor,
        mask: Tensor | None = None,
        time: Tensor | None = None,
        spans: Tensor | None = None,
        *,
        pool: bool,
        places: Tensor | None = None,
    ) -> Tensor:
        """Weights without the gain.

        Args:
            features: (B, L, width) hidden states.
            mask: (N,) or (B, 1, N) bool, True = active.
            time: (B, 64) features of the timestep.
            spans: (B, L, N) bool.
            pool: one weight vector per row (scope sample) instead of one per token.
            places: (B, L) non-negative, the tokens that pooling counts; None = all alike.

        Returns:
            (B, 1 or L, N) fp32.
        """
        with torch.autocast(features.device.type, enabled=False):
            logits = self.logits(features, time, spans, pool, places)
        return scaled(logits, self.log_tau.exp(), self.config.scale, mask)


def scaled(logits: Tensor, tau: Tensor, scale: str, mask: Tensor | None) -> Tensor:
    """Weights (…, N) from logits (…, N), one more for a null expert; ``scale`` as in :class:`GateConfig`."""
    if scale == "null":
        return null_gate(logits[..., :-1], logits[..., -1:], tau, mask)
    return (sigmoid_gate if scale == "sigmoid" else softmax_gate)(logits, tau, mask)


def pooled(features: Tensor, places: Tensor | None) -> Tensor:
    """Mean over tokens, (B, L, d) → (B, 1, d), of those that count."""
    if places is None or places.shape[1] != features.shape[1]:
        return features.mean(1, keepdim=True)
    share = places.to(features.dtype) / places.sum(1, keepdim=True).clamp_min(1e-6)
    return (features * share.unsqueeze(-1)).sum(1, keepdim=True)
