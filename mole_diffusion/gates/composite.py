"""LoRA Composite: the mean of what the model predicts with each expert alone (arXiv 2402.16843)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from mole_diffusion.errors import InvalidRequest
from mole_diffusion.functional import nla_weights
from mole_diffusion.gates.config import LoraComposite
from mole_diffusion.gates.protocol import Run, Total
from mole_diffusion.gates.switch import strengths

if TYPE_CHECKING:
    from mole_diffusion.context import Context


class Apart(nn.Module):
    """ẽ(z, c) = 1/N · Σ_i [(1 − s)·e_i(z) + s·e_i(z, c)] with e_i the model with expert i alone, s the guidance scale.

    Guidance is linear, so the mean is taken of the main model's own outputs, conditional and unconditional rows alike:
    one call of it runs N passes. Where the caller bends the guidance afterwards (guidance_rescale), that happens after
    the mean, not before. Masked experts have no pass; rows with their own subsets average over these. Text encoders,
    which run once, get NLA. What traces show is each expert's share of the mean.

    Attributes:
        strengths: (N,).
    """

    total: Total = "free"
    strengths: Tensor

    def __init__(self, experts: int, config: LoraComposite) -> None:
        super().__init__()
        self.register_buffer("strengths", strengths(config.weights, experts))

    def at(self, run: Run) -> Tensor:
        """(1, rows or 1, 1, N)."""
        return self.once(run.mask)

    def once(self, mask: Tensor) -> Tensor:
        """NLA of the strengths, (1, rows or 1, 1, N)."""
        return (self.strengths * nla_weights(mask.shape[-1], mask)).reshape(1, -1, 1, mask.shape[-1])

    def passes(self, mask: Tensor, active: Sequence[bool]) -> list[tuple[Tensor, Tensor]]:
        """One per active expert: its weights (rows or 1, 1, N) and its share of the mean, (rows or 1,)."""
        rows = mask.reshape(-1, 1, mask.shape[-1])
        shares = torch.where(rows.any(-1, keepdim=True), rows, torch.ones_like(rows)).float()
        shares[..., [not on for on in active]] = 0.0
        shares = shares / shares.sum(-1, keepdim=True)
        single = torch.eye(mask.shape[-1], device=mask.device)
        chosen = [expert for expert, on in enumerate(active) if on]
        return [(self.strengths * single[expert] * rows, shares[:, 0, expert]) for expert in chosen]


def average_passes(main: nn.Module, context: Context) -> Callable[[], None]:
    """Make every call of the main model the mean of its passes, until the returned function is called.

    Does nothing where the gate's schedule is not :class:`Apart`.
    """
    schedule = getattr(context.gate, "schedule", None)
    if not isinstance(schedule, Apart):
        return lambda: None
    waiting: list[tuple[Tensor, Tensor]] = []
    shares: list[Tensor] = []

    def first(*_: Any) -> None:
        run = context.run
        waiting[:] = [] if run is None else schedule.passes(run.mask, context.switches.flags[: context.switches.gated])
        shares[:] = [share for _, share in waiting]
        if waiting:
            context.force(waiting.pop(0)[0])

    def rest(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        outputs = [output]
        try:
            for weights, _ in waiting:
                context.force(weights)
                outputs.append(module.forward(*args, **kwargs))
        finally:
            context.force(None)
        return mean_of(outputs, shares) if len(outputs) > 1 else output

    before = main.register_forward_pre_hook(first, with_kwargs=True)
    after = main.register_forward_hook(rest, with_kwargs=True, prepend=True)

    def undo() -> None:
        before.remove()
        after.remove()

    return undo


def mean_of(outputs: Sequence[Any], shares: Sequence[Tensor]) -> Any:
    """Σ share·output over passes, whatever the model returns: a tensor, a tuple of them, or a named record.

    Raises:
        InvalidRequest: something in it is no tensor, such as the cache of a text model.
    """
    head = outputs[0]
    if isinstance(head, Tensor):
        total = torch.zeros_like(head, dtype=torch.float32)
        for output, share in zip(outputs, shares, strict=True):
            total = total + output.float() * share.reshape(-1, *[1] * (head.ndim - 1))
        return total.to(head.dtype)
    if isinstance(head, Mapping):
        return type(head)(**{key: mean_of([output[key] for output in outputs], shares) for key in head})
    if isinstance(head, tuple):
        return tuple(mean_of(parts, shares) for parts in zip(*outputs, strict=True))
    if head is None:
        return None
    raise InvalidRequest(
        f"Averaging the passes needs a model that returns tensors, this one returns {type(head).__name__} too: call it "
        "with use_cache=False, or choose another method."
    )
