"""Gates trained with the language model's own loss."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from mole_diffusion.composition import Composition
from mole_diffusion.errors import InvalidRequest


def train_gates(
    composition: Composition,
    batches: Sequence[Mapping[str, Tensor]],
    *,
    steps: int,
    lr: float = 1e-3,
    balance: float = 0.0,
    weight_decay: float = 0.0,
    seed: int = 0,
    progress: Callable[[int, float], None] | None = None,
) -> list[float]:
    """AdamW on L_LM + balance · L_balance (arXiv 2404.13628, Eq. 16, where balance is α = 0.5).

    Only the gate's parameters learn. The model runs in evaluation mode, so that the seed decides everything.

    Args:
        composition: on a language model; attached for the time of training where it is not.
        batches: what the model's forward takes, ``labels`` among it, on the model's device. For causal models the
            prompt's labels are −100: gates of the scope sample see what comes before the first other one.
        steps: number of updates; batches come in a new random order for every round.
        lr: AdamW's rate.
        balance: α. The mean gate runs over attended tokens (encoder-decoder models: over all places).
        weight_decay: AdamW's.
        seed: of the order of batches.
        progress: called with the number of steps done and the loss.

    Returns:
        The language model's loss at every step, without the balance loss.

    Raises:
        InvalidRequest: nothing to learn, no batches, or a batch without labels.
    """
    parameters = list(composition.parameters())
    if not parameters:
        raise InvalidRequest(
            "This gate has nothing to learn: choose a learned gate, a router or learned static weights."
        )
    if not batches or any("labels" not in batch for batch in batches):
        raise InvalidRequest("Training gates needs at least one batch, and labels in each.")
    model = composition.host.models()[composition.host.main]
    optimizer = torch.optim.AdamW(parameters, lr=lr, weight_decay=weight_decay)
    uncached = {"use_cache": False} if hasattr(model.config, "use_cache") else {}
    attached, training, losses = composition.attached, model.training, []
    try:
        with torch.enable_grad():
            composition.train()
            model.eval()
            if not attached:
                composition.attach()
            for batch in _order(batches, steps, seed):
                loss = model(**{**uncached, **batch}).loss
                whole = loss + balance * composition.balance_loss(_attended(model, batch)) if balance else loss
                optimizer.zero_grad(set_to_none=True)
                whole.backward()
                optimizer.step()
                losses.append(float(loss.detach()))
                if progress is not None:
                    progress(len(losses), losses[-1])
    finally:
        composition.eval()
        if not attached:
            composition.detach()
        model.train(training)
    return losses


def _order(batches: Sequence[Mapping[str, Tensor]], steps: int, seed: int) -> Iterator[Mapping[str, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    order: list[int] = []
    for _ in range(steps):
        order = order or torch.randperm(len(batches), generator=generator).tolist()
        yield batches[order.pop()]


def _attended(model: torch.nn.Module, batch: Mapping[str, Tensor]) -> Tensor | None:
    """(rows, 1, L), as :meth:`Composition.balance_loss` takes it."""
    mask = batch.get("attention_mask")
    single = not getattr(model.config, "is_encoder_decoder", False)
    return mask.unsqueeze(1) if mask is not None and mask.ndim == 2 and single else None
