"""K-LoRA: every place takes the subject or the style, whichever is stronger there (arXiv 2502.18461)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from mole_diffusion.errors import InvalidRequest
from mole_diffusion.experts.canonical import Expert, LowRank
from mole_diffusion.functional import nla_weights
from mole_diffusion.gates.config import KLora
from mole_diffusion.gates.protocol import Run, Total
from mole_diffusion.gates.schedule import progress

if TYPE_CHECKING:
    from mole_diffusion.plan import Plan


class TopK(nn.Module):
    """The choice of K-LoRA.

    With |ΔW| the absolute elements of s·B·A in one module, K = r_c·r_s, and t / T how far the denoising is:

        S_c = Σ top-K |ΔW_c|,   S_s = Σ top-K |ΔW_s|,   γ = Σ_modules Σ |ΔW_c| / Σ_modules Σ |ΔW_s|
        the subject c where S_c > (α·t / T + β)·γ·S_s, the style s elsewhere

    The chosen expert has weight 1, the other 0. Where this differs from the paper and its code:

    - t / T is the progress of the timesteps, not the share of calls made: the same for evenly spaced timesteps.
    - ΔW has the file's scale α / r in it; γ takes a scale that all modules share out again.
    - Every module that both experts touch chooses, feed-forward and convolutions too; one that a single expert touches
      takes that one. With the granularity "layer" the sums run over the modules of the layer before they are compared.
    - Text encoders get NLA. With one of the two masked the other is taken everywhere.

    The style is the expert with the role style; where both have the same role, the second.
    """

    total: Total = "free"

    def __init__(self, plan: Plan, config: KLora) -> None:
        """Raises InvalidRequest: not two gated experts, or one is DoRA."""
        super().__init__()
        _check(plan)
        self.plan = plan
        self.config = config
        self.subject, self.style = _roles(plan.gated)
        self._ratios: Tensor | None = None

    def at(self, run: Run) -> Tensor:
        """(M, rows or 1, 1, 2)."""
        scale = self.config.alpha * progress(run) + self.config.beta
        wins = self.ratios(run.mask.device).unsqueeze(1) > scale
        picked = torch.stack([wins, ~wins] if self.subject == 0 else [~wins, wins], -1).unsqueeze(2)
        return torch.where(run.mask.all(-1, keepdim=True), picked, run.mask).float()

    def once(self, mask: Tensor) -> Tensor:
        """NLA, (1, rows or 1, 1, 2)."""
        return nla_weights(mask.shape[-1], mask).reshape(1, -1, 1, mask.shape[-1])

    @torch.no_grad()
    def ratios(self, device: torch.device) -> Tensor:
        """S_c / (γ·S_s) of every place, (M,) fp32; ∞ where the style has nothing, 0 where only the style has something.

        Computed at the first call, on the device: it reads every ΔW once.
        """
        if self._ratios is None or self._ratios.device != device:
            sums = {block.name: torch.zeros(2, device=device) for block in self.plan.blocks}
            totals = torch.zeros(2, device=device)
            for key, pairs in self.plan.pairs.items():
                block = self.plan.sites[key].block
                if block.kind == "encoder":
                    continue
                subject, style = pairs.get(self.subject), pairs.get(self.style)
                found, whole = top_sums(subject, style, device)
                sums[block.name] += found
                totals += whole if subject is not None and style is not None else 0.0
            gamma = totals[0] / totals[1] if bool((totals > 0).all()) else 1.0
            tops = torch.stack(list(sums.values()))
            self._ratios = tops[:, 0] / (gamma * tops[:, 1])
        return self._ratios


def top_sums(first: LowRank | None, second: LowRank | None, device: torch.device) -> tuple[Tensor, Tensor]:
    """(2,) sums of the K = r_1·r_2 largest elements of |ΔW| of one module, and (2,) sums of all; 0 where it is None.

    K is never more than there are elements.
    """
    ranks = [pair.rank for pair in (first, second) if pair is not None]
    most = ranks[0] * ranks[-1] if ranks else 0
    sums, totals = torch.zeros(2, device=device), torch.zeros(2, device=device)
    for side, pair in enumerate((first, second)):
        if pair is not None:
            a, b = pair.a.to(device, torch.float32).flatten(1), pair.b.to(device, torch.float32)
            elements = (pair.scale * (b @ a)).abs().flatten()
            sums[side] = elements.topk(min(most, elements.numel()), sorted=False).values.sum()
            totals[side] = elements.sum()
    return sums, totals


def _roles(experts: tuple[Expert, ...]) -> tuple[int, int]:
    """(subject, style) as columns."""
    turned = experts[0].role == "style" and experts[1].role != "style"
    return (1, 0) if turned else (0, 1)


def _check(plan: Plan) -> None:
    if len(plan.gated) != 2:
        names = ", ".join(expert.name for expert in plan.gated)
        raise InvalidRequest(
            f"K-LoRA chooses between two experts, a subject and a style; here are {len(plan.gated)} ({names}). Leave "
            "others out, or place them outside the gate."
        )
    dora = next((expert.name for expert in plan.gated if expert.dora), None)
    if dora is not None:
        raise InvalidRequest(
            f"K-LoRA compares low-rank changes, but {dora!r} is DoRA, whose change depends on the base: choose another "
            "method for it."
        )
