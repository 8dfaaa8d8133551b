"""A composition: a base, experts, and a gate or static weights, attached to a pipeline and taken off again."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from mole_diffusion.attach import Attachment
from mole_diffusion.context import Context, Record
from mole_diffusion.errors import InvalidRequest
from mole_diffusion.experts.canonical import Expert
from mole_diffusion.experts.inspect import HasShapes, check_fits
from mole_diffusion.functional import balance_loss, mean_gate, resample
from mole_diffusion.gates import GateConfig, LearnedGates, SpanGate, StaticGate, StaticWeights, TriggerSpans
from mole_diffusion.gates.config import AnyGate, learned_static, nla, weighted_sum
from mole_diffusion.merge import Merged, collapse, column_weights
from mole_diffusion.plan import Plan, build_plan
from mole_diffusion.prompts import Conditions, prompt_spans
from mole_diffusion.trace import Trace

__all__ = ["Composition", "StaticWeights", "TriggerSpans", "compose", "learned_static", "nla", "weighted_sum"]


def compose(
    pipe: Any,
    experts: Sequence[Expert],
    *,
    gate: AnyGate | None = None,
    base: HasShapes | None = None,
) -> Composition:
    """Compose experts on a pipeline; use the result as a context manager, or attach and detach it.

    Args:
        pipe: a diffusers pipeline with ``unet``, ``tokenizer`` and ``text_encoder`` (SDXL: also ``…_2``).
        experts: in the order of the weights.
        gate: default: the paper's block gate, one weight per expert and image.
        base: names the base in errors and in saved files.

    Raises:
        BaseMismatch: an expert does not fit.
        InvalidRequest: names are not unique, a setting contradicts the experts, or the pipeline already has adapters.
    """
    for expert in experts if base is not None else ():
        check_fits(expert, base)  # pyright: ignore[reportArgumentType]
    return Composition(pipe, build_plan(pipe, experts), gate or GateConfig(), base)


class Composition:
    """Experts on a pipeline, weighed by a gate. Made by :func:`compose`.

    Attributes:
        config: what the gate was asked to be.
        gate: the gate, an ``nn.Module`` that lives outside the pipeline.
        base: the base, where it was named.
        recipe: free notes about how the gate was trained; saved with it.
    """

    def __init__(self, pipe: Any, plan: Plan, config: AnyGate, base: HasShapes | None = None) -> None:
        self.pipe = pipe
        self.plan = plan
        self.config = config
        self.base = base
        self.recipe: dict[str, Any] = {}
        self.gate = build_gate(plan, config).to(next(pipe.unet.parameters()).device).eval()
        self._context = Context(plan, self.gate)
        self._attachment: Attachment | None = None
        self._merged: Merged | None = None
        self._record = True

    # What it is.

    @property
    def experts(self) -> tuple[Expert, ...]:
        """All experts, in the caller's order."""
        return self.plan.experts

    @property
    def names(self) -> tuple[str, ...]:
        """Their names."""
        return tuple(expert.name for expert in self.plan.experts)

    @property
    def blocks(self) -> tuple[str, ...]:
        """Names of the blocks that hold targets, in the pipeline's order."""
        return tuple(block.name for block in self.plan.blocks)

    @property
    def attached(self) -> bool:
        """Is it on the pipeline now?"""
        return self._attachment is not None

    @property
    def masked(self) -> tuple[str, ...]:
        """Names of the experts that are switched off."""
        on = dict(zip(self.plan.columns, self._context.active + self._context.always_on, strict=True))
        return tuple(expert.name for expert in self.plan.experts if not on[expert])

    # On and off the pipeline.

    def attach(self) -> Composition:
        """Replace the target modules; base parameters take no gradient until :meth:`detach`."""
        if self._attachment is not None:
            raise InvalidRequest("This composition is already attached.")
        build_plan(self.pipe, self.plan.experts)
        self._attachment = Attachment(self.pipe, self.plan, self._context, self._heard)
        return self

    def detach(self) -> None:
        """Restore the pipeline exactly; does nothing where nothing is attached."""
        self.unmerge()
        if self._attachment is not None:
            self._attachment.undo()
            self._attachment = None
        self._context.clear()

    def __enter__(self) -> Composition:
        return self if self.attached else self.attach()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.detach()

    # Prompts.

    def condition(self, prompts: Sequence[str] | None, *, guidance: bool) -> None:
        """Announce the next batches, for callers who encode prompts themselves.

        Args:
            prompts: the conditional prompts, in batch order; a batch may hold each several times in a row.
                None = unknown (fine for gates that do not look at triggers).
            guidance: batches are [unconditional rows, conditional rows] of equal length.
        """
        spans = None
        if prompts is not None and self.gate.needs_spans:
            spans = prompt_spans(self.pipe, prompts, self.plan.gated)
        self._context.conditions = Conditions(guidance, spans)
        self._context.recorder.reset()

    def _heard(self, prompts: list[str] | None, guidance: bool) -> None:
        """The pipeline encodes prompts; embeddings that come ready-made keep the prompts announced before."""
        if prompts is None:
            self._context.conditions = Conditions(guidance, self._context.conditions.spans)
            self._context.recorder.reset()
        else:
            self.condition(prompts, guidance=guidance)

    # Masks.

    def mask(self, *names: str) -> None:
        """Switch experts off; their weight goes to the others in proportion (not with sigmoid gates or plain sums)."""
        self._switch(names, False)

    def unmask(self, *names: str) -> None:
        """Switch experts on again; without names all of them."""
        self._switch(names or self.names, True)

    def _switch(self, names: Sequence[str], on: bool) -> None:
        unknown = [name for name in names if name not in self.names]
        if unknown:
            raise InvalidRequest(f"No expert is named {unknown[0]!r}; there are {', '.join(self.names)}.")
        merged = self._merged is not None
        self.unmerge()
        count = len(self.plan.gated)
        for column, expert in enumerate(self.plan.columns):
            if expert.name in names:
                flags = self._context.active if column < count else self._context.always_on
                flags[column if column < count else column - count] = on
        if merged:
            self.merge()

    # Training.

    def parameters(self) -> Iterator[nn.Parameter]:
        """The trainable parameters: gates only."""
        return self.gate.parameters()

    def state_dict(self) -> dict[str, Tensor]:
        """The gate's tensors."""
        return self.gate.state_dict()

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """The reverse of :meth:`state_dict`, strict."""
        self.gate.load_state_dict(state)

    def train(self, mode: bool = True) -> Composition:
        """Training mode: nothing is traced."""
        self.gate.train(mode)
        self._context.recorder.enabled = self._record and not mode
        return self

    def eval(self) -> Composition:
        """Inference mode."""
        return self.train(False)

    def balance_loss(self, token_mask: Tensor | None = None) -> Tensor:
        """L_balance (Eq. 14-15) of the last UNet call, differentiable; masked experts are left out.

        Args:
            token_mask: (B, H, W) over the conditional rows (or all rows), where the subjects are, at any resolution;
                token gates are averaged there. Gates of the sample scope have no places and do not need it.

        Raises:
            InvalidRequest: no gate has run yet.
        """
        records = self._context.records
        if not records:
            raise InvalidRequest("No gate has run yet: call the UNet with the composition attached first.")
        means = torch.stack(
            [mean_gate(record.probabilities, _places(record, token_mask)) for record in records.values()]
        )
        return balance_loss(means, self._context.mask(means.device))

    # Traces.

    def record(self, on: bool = True) -> None:
        """Record weights during inference (on by default)."""
        self._record = on
        self._context.recorder.enabled = on and not self.gate.training

    def trace(self) -> Trace:
        """Weights since the prompts were announced last."""
        return self._context.recorder.trace(tuple(expert.name for expert in self.plan.gated))

    # Static weights.

    def merge(self) -> None:
        """Put static weights into the base's weights, so that they cost nothing; masks keep working.

        Raises:
            InvalidRequest: not attached, or the gate looks at its input.
        """
        if self._attachment is None:
            raise InvalidRequest("Attach the composition before merging it.")
        if self._merged is None:
            self._merged = Merged(self._attachment.layers, self.plan, self._static_weights())
            self._context.frozen_out = True

    def unmerge(self) -> None:
        """Restore the base's weights bit for bit."""
        if self._merged is not None:
            self._merged.undo()
            self._merged = None
            self._context.frozen_out = False

    def collapse(self, name: str = "collapsed") -> Expert:
        """One ordinary LoRA of rank Σ r_i that equals this composition of static weights."""
        return Expert(name, collapse(self.plan, self._static_weights()), base=self.plan.experts[0].base)

    def _static_weights(self) -> dict[str, Tensor]:
        mask = self._context.mask(next(iter(self.gate.state_dict().values()), torch.empty(0)).device)
        return column_weights(self.plan, self.gate, mask, self._context.always_on)

    # Files.

    def save(self, path: str | Path) -> Path:
        """Write gate, hashes of the experts and recipe as one safetensors file, atomically."""
        from mole_diffusion.persist import save_composition

        return save_composition(self, path)


def build_gate(plan: Plan, config: AnyGate) -> LearnedGates | StaticGate | SpanGate:
    """The gate module for a plan.

    Raises:
        InvalidRequest: the settings contradict the experts.
    """
    count = len(plan.gated)
    if isinstance(config, StaticWeights):
        return StaticGate(plan.blocks, count, config)
    if isinstance(config, GateConfig):
        return LearnedGates(plan.blocks, count, config)
    triggers = [expert.trigger for expert in plan.gated]
    if not all(triggers):
        nameless = next(expert.name for expert in plan.gated if not expert.trigger)
        raise InvalidRequest(f"Trigger spans need every expert's trigger words; {nameless!r} has none.")
    if len({str(trigger).lower() for trigger in triggers}) < count:
        raise InvalidRequest("Two experts have the same trigger words, so trigger spans cannot tell them apart.")
    return SpanGate(count, config)


def _places(record: Record, token_mask: Tensor | None) -> Tensor | None:
    """(rows, L) weights of the places that a token gate's mean runs over."""
    rows, length, _ = record.probabilities.shape
    if length == 1:
        return None
    if record.spans is not None:
        owned = record.spans.any(-1)
        return owned if bool(owned.any()) else None
    if token_mask is None or record.grid[0] * record.grid[1] != length:
        return None
    pooled = resample(token_mask[-rows:].float().unsqueeze(1), record.grid)
    return pooled.to(record.probabilities.device).flatten(1)
