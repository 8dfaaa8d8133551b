"""A composition: a base, experts, and a gate or static weights, attached to a pipeline and taken off again."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

import torch
from torch import Tensor, nn

from mole_diffusion.attach import Attachment
from mole_diffusion.context import Context, Record
from mole_diffusion.errors import InvalidRequest
from mole_diffusion.experts.canonical import Expert
from mole_diffusion.experts.inspect import HasShapes, check_fits
from mole_diffusion.functional import balance_loss, entropy_loss, mean_gate, resample
from mole_diffusion.gates import GateConfig, LearnedGates, SpanGate, StaticGate, StaticWeights, TriggerSpans
from mole_diffusion.gates.config import AnyGate, RouterConfig, learned_static, nla, weighted_sum
from mole_diffusion.gates.router import RouterGates
from mole_diffusion.hosts import host_for
from mole_diffusion.merge import Merged, collapse, column_weights
from mole_diffusion.plan import Plan, build_plan
from mole_diffusion.prompts import Conditions
from mole_diffusion.regions import Region, region_maps
from mole_diffusion.trace import Trace

__all__ = ["Composition", "StaticWeights", "TriggerSpans", "compose", "learned_static", "nla", "weighted_sum"]


def compose(
    pipe: Any,
    experts: Sequence[Expert],
    *,
    gate: AnyGate | None = None,
    base: HasShapes | None = None,
    outside: Sequence[str] = (),
) -> Composition:
    """Compose experts on a pipeline; use the result as a context manager, or attach and detach it.

    Args:
        pipe: a diffusers pipeline with ``unet`` or ``transformer`` and its text encoders, a bare denoiser, a
            transformers model, or any module whose linear and convolution layers experts name "module.<path>".
        experts: in the order of the weights.
        gate: default: the paper's block gate, one weight per expert and image.
        base: names the base in errors and in saved files.
        outside: names of experts that stay outside the gate, always on with weight 1, such as a style; accelerators
            always do.

    Raises:
        BaseMismatch: an expert does not fit.
        InvalidRequest: names are not unique, a setting contradicts the experts, or the pipeline already has adapters.
    """
    for expert in experts if base is not None else ():
        check_fits(expert, base)  # pyright: ignore[reportArgumentType]
    config = gate or GateConfig()
    plan = build_plan(host_for(pipe), experts, config.granularity, outside)
    return Composition(pipe, plan, config, base)


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
        self.host = host_for(pipe)
        self.plan = plan
        self.config = config
        self.base = base
        self.recipe: dict[str, Any] = {}
        self.gate = build_gate(plan, config).to(next(self.host.models()[self.host.main].parameters()).device).eval()
        self._context = Context(plan, self.gate, self._heard)
        self._attachment: Attachment | None = None
        self._merged: Merged | None = None
        self._record = True
        self._subsets: Tensor | None = None

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
        outside = [expert.name for expert in self.plan.always]
        build_plan(self.host, self.plan.experts, self.config.granularity, outside)  # has the model changed since?
        self._attachment = Attachment(self.host, self.plan, self._context)
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

    def condition(
        self, prompts: Sequence[str] | None, *, guidance: bool, subsets: Sequence[Sequence[str]] | None = None
    ) -> None:
        """Announce the next batches, for callers who encode prompts themselves.

        Args:
            prompts: the conditional prompts, in batch order; a batch may hold each several times in a row.
                None = unknown (fine for gates that do not look at triggers).
            guidance: batches are [unconditional rows, conditional rows] of equal length.
            subsets: for each prompt the names of the gated experts that it may use; None = those of
                :meth:`use_subsets`, if any.
        """
        spans = None
        if prompts is not None and self.gate.needs_spans:
            spans = self.host.spans(prompts, self.plan.gated)
        chosen = self._subsets if subsets is None else self._as_mask(subsets)
        self._context.announce(Conditions(guidance, spans, chosen))

    def use_subsets(self, subsets: Sequence[Sequence[str]] | None) -> None:
        """Give every prompt of the coming batches its own experts; text encoders keep them all.

        Args:
            subsets: for each prompt the names of its gated experts; None = all experts for all prompts again.

        Raises:
            InvalidRequest: an unknown name.
        """
        self._subsets = None if subsets is None else self._as_mask(subsets)
        conditions = self._context.conditions
        self._context.conditions = Conditions(conditions.guidance, conditions.spans, self._subsets)

    def _as_mask(self, subsets: Sequence[Sequence[str]]) -> Tensor:
        for name in (name for subset in subsets for name in subset):
            self._check_name(name)
        return torch.tensor([[expert.name in subset for expert in self.plan.gated] for subset in subsets])

    def _heard(self, prompts: Sequence[str] | None, guidance: bool) -> None:
        """The pipeline encodes prompts; embeddings that come ready-made keep the prompts announced before."""
        if prompts is None:
            self._context.announce(Conditions(guidance, self._context.conditions.spans, self._subsets))
        else:
            self.condition(prompts, guidance=guidance)

    # Regions.

    def place(self, regions: Mapping[str, Region] | None, *, floor: float = 0.01) -> None:
        """Say where experts belong: a prior on the weights of image tokens, log(region) added to their logits.

        Args:
            regions: expert name → a box (left, top, right, bottom) in 0…1, or a mask (H, W) in 0…1 of any size; experts
                that are not named may be anywhere. None = no regions.
            floor: the least prior, so that a region pulls and does not cut; 0 is allowed with plain sums only.

        Raises:
            InvalidRequest: an unknown name, a malformed region, or a floor that the gate cannot have.
        """
        if regions is None:
            self._context.prior = None
            return
        for name in regions:
            self._check_name(name)
        if not 0 <= floor < 1 or (floor == 0 and self.gate.total != "free"):
            raise InvalidRequest(f"A region's floor must be above 0 (0 with plain sums) and below 1, got {floor!r}.")
        self._context.prior = region_maps([regions.get(expert.name) for expert in self.plan.gated], floor)

    # Masks.

    def mask(self, *names: str) -> None:
        """Switch experts off; their weight goes to the others in proportion (not with sigmoid gates or plain sums)."""
        self._switch(names, False)

    def unmask(self, *names: str) -> None:
        """Switch experts on again; without names all of them."""
        self._switch(names or self.names, True)

    def _switch(self, names: Sequence[str], on: bool) -> None:
        for name in names:
            self._check_name(name)
        merged = self._merged is not None
        self.unmerge()
        count = len(self.plan.gated)
        for column, expert in enumerate(self.plan.columns):
            if expert.name in names:
                flags = self._context.active if column < count else self._context.always_on
                flags[column if column < count else column - count] = on
        if merged:
            self.merge()

    def _check_name(self, name: str) -> None:
        if name not in self.names:
            raise InvalidRequest(f"No expert is named {name!r}; there are {', '.join(self.names)}.")

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

    def balance_loss(
        self, token_mask: Tensor | None = None, *, kind: Literal["product", "entropy"] = "product"
    ) -> Tensor:
        """L_balance (Eq. 14-15) of the last UNet call, differentiable; masked experts are left out.

        Args:
            kind: "product" = the paper's; "entropy" = the negative entropy of the same mean gate.
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
        loss = entropy_loss if kind == "entropy" else balance_loss
        return loss(means, self._context.mask(means.device))

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


def build_gate(plan: Plan, config: AnyGate) -> LearnedGates | StaticGate | SpanGate | RouterGates:
    """The gate module for a plan.

    Raises:
        InvalidRequest: the settings contradict the experts.
    """
    count = len(plan.gated)
    if isinstance(config, StaticWeights):
        return StaticGate(plan.blocks, count, config)
    if isinstance(config, GateConfig):
        return LearnedGates(plan.blocks, count, config)
    if isinstance(config, RouterConfig):
        return RouterGates(plan.sizes, config)
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
