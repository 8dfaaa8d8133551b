"""A composition: a base, experts, and a gate or static weights, attached to a pipeline and taken off again."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

import torch
from torch import Tensor, nn

from mole_diffusion.attach import Attachment
from mole_diffusion.context import Context
from mole_diffusion.errors import InvalidRequest
from mole_diffusion.exchange import carry_over, exchange, padded, take_over
from mole_diffusion.experts.canonical import Expert
from mole_diffusion.experts.combine import shared_embeddings
from mole_diffusion.experts.inspect import HasShapes, check_fits
from mole_diffusion.functional import balance_loss, entropy_loss, mean_gate, nla_weights
from mole_diffusion.gates import GateConfig, LearnedGates, SpanGate, StaticGate, StaticWeights, TriggerSpans
from mole_diffusion.gates.composite import average_passes
from mole_diffusion.gates.config import AnyGate, KLora, learned_static, nla, weighted_sum
from mole_diffusion.gates.make import build_gate
from mole_diffusion.gates.protocol import Run
from mole_diffusion.gates.router import RouterGates, TrainedRouter
from mole_diffusion.hosts import host_for
from mole_diffusion.merge import Merged, collapse, column_weights, trace_weights
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
    bucket: bool = False,
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
        bucket: pad experts to the next power of two of their largest rank, so that :meth:`Composition.switch` can put
            any set of as many experts on the same modules into the same tensors; compiled models stay compiled.

    Raises:
        BaseMismatch: an expert does not fit.
        InvalidRequest: names are not unique, a setting contradicts the experts, or the pipeline already has adapters.
    """
    for expert in experts if base is not None else ():
        check_fits(expert, base)  # pyright: ignore[reportArgumentType]
    config = gate or GateConfig()
    plan = build_plan(host_for(pipe), experts, config.granularity, outside)
    _check_bucket(bucket, config)
    return Composition(pipe, padded(plan) if bucket else plan, config, base, bucket=bucket)


class Composition:
    """Experts on a pipeline, weighed by a gate. Made by :func:`compose`.

    Attributes:
        config: what the gate was asked to be.
        gate: the gate, an ``nn.Module`` that lives outside the pipeline.
        base: the base, where it was named.
        recipe: free notes about how the gate was trained; saved with it.
    """

    def __init__(
        self, pipe: Any, plan: Plan, config: AnyGate, base: HasShapes | None = None, *, bucket: bool = False
    ) -> None:
        self.pipe = pipe
        self.host = host_for(pipe)
        self.plan = plan
        self.config = config
        self.base = base
        self.bucket = bucket
        self.recipe: dict[str, Any] = {}
        self.gate = build_gate(plan, config).to(next(self.host.models()[self.host.main].parameters()).device).eval()
        self._context = Context(plan, self.gate, self._heard)
        self._attachment: Attachment | None = None
        self._unwatch: Callable[[], None] = lambda: None
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
        on = dict(zip(self.plan.columns, self._context.switches.flags, strict=True))
        return tuple(expert.name for expert in self.plan.experts if not on[expert])

    # On and off the pipeline.

    def attach(self) -> Composition:
        """Replace the target modules; base parameters take no gradient until :meth:`detach`."""
        if self._attachment is not None:
            raise InvalidRequest("This composition is already attached.")
        build_plan(self.host, self.plan.experts, self.config.granularity, self._outside)  # has the model changed since?
        self._attachment = Attachment(self.host, self.plan, self._context)
        self._unwatch = average_passes(self.host.models()[self.host.main], self._context)
        return self

    def detach(self) -> None:
        """Restore the pipeline exactly; does nothing where nothing is attached."""
        self.unmerge()
        if self._attachment is not None:
            self._unwatch()
            self._attachment.undo()
            self._attachment = None
        self._context.clear()

    def __enter__(self) -> Composition:
        return self if self.attached else self.attach()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.detach()

    def switch(
        self, experts: Sequence[Expert], *, gate: AnyGate | None = None, outside: Sequence[str] = ()
    ) -> None:
        """Other experts on the same base, which is not touched; attached before, attached after, all of them on.

        Where number, modules and ranks are the same (see ``bucket`` of :func:`compose`), the tensors stay and only
        numbers change. A router keeps what it has learned (modules that it never saw start at NLA), other gates start
        anew.

        Args:
            experts, outside: as for :func:`compose`.
            gate: default: the same settings.

        Raises:
            BaseMismatch, InvalidRequest: as :func:`compose`; nothing has changed then.
        """
        for expert in experts if self.base is not None else ():
            check_fits(expert, self.base)  # pyright: ignore[reportArgumentType]
        config = gate or self.config
        _check_bucket(self.bucket, config)
        plan = build_plan(self.host, experts, config.granularity, outside, owner=self._context)
        plan = padded(plan) if self.bucket else plan
        new = build_gate(plan, config).to(next(self.host.models()[self.host.main].parameters()).device)
        both = isinstance(new, RouterGates) and isinstance(self.gate, RouterGates)
        if both and not isinstance(gate, TrainedRouter):  # one that is given has learned elsewhere
            carry_over(new, self.gate)
        merged = self._merged is not None
        self.unmerge()
        try:
            if not self._exchanged(plan, config, new):
                self._replace(plan, config, new)
        except BaseException:
            if merged:
                self.merge()
            raise
        self._subsets = None
        self.record(self._record)

    def _replace(self, plan: Plan, config: AnyGate, new: Any) -> None:
        """Take everything off and put the others on; where that fails, these again."""
        attached, before = self.attached, (self.plan, self.config, self.gate, self._context)
        self.detach()
        self.plan, self.config, self.gate = plan, config, new.train(self.gate.training)
        self._context = Context(plan, self.gate, self._heard)
        try:
            if attached:
                self.attach()
        except BaseException:
            self.plan, self.config, self.gate, self._context = before
            self.attach()
            raise

    def _exchanged(self, plan: Plan, config: AnyGate, new: Any) -> bool:
        """Put everything into the tensors that are there; False, and nothing has changed, where that cannot be."""
        same = config == self.config and plan.blocks == self.plan.blocks and len(plan.gated) == len(self.plan.gated)
        fixed = isinstance(new, LearnedGates | StaticGate | SpanGate | RouterGates)
        words = any(expert.embeddings for expert in (*self.experts, *plan.experts))
        if self._attachment is None or words or not (same and fixed) or not exchange(self._attachment.layers, plan):
            return False
        copied = take_over(self.gate, new)
        assert copied
        self.plan = plan
        self._context.adopt(plan)
        self._attachment.gated[:] = plan.gated
        for column in range(len(plan.columns)):
            self._context.switches.set(column, True)
        self._context.prior = None
        self._context.clear()
        self._context.announce(Conditions())
        return True

    def add(self, expert: Expert, *, gate: AnyGate | None = None) -> None:
        """One expert more; see :meth:`switch`."""
        self.switch([*self.experts, expert], gate=gate, outside=self._outside)

    def remove(self, name: str, *, gate: AnyGate | None = None) -> None:
        """One expert less, for good; :meth:`mask` switches one off for a while. See :meth:`switch`."""
        self._check_name(name)
        kept = [expert for expert in self.experts if expert.name != name]
        self.switch(kept, gate=gate, outside=[other for other in self._outside if other != name])

    @property
    def _outside(self) -> list[str]:
        return [expert.name for expert in self.plan.always]

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
        self._refuse_merged(subsets, "subsets for each prompt")
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
            InvalidRequest: an unknown name, or the weights are merged into the base.
        """
        self._refuse_merged(subsets, "subsets for each prompt")
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
            known = self._context.conditions
            self._context.announce(Conditions(guidance, known.spans, known.subsets))
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
            InvalidRequest: an unknown name, a malformed region, a floor that the gate cannot have, or the weights are
                merged into the base.
        """
        self._refuse_merged(regions, "regions")
        if regions is None:
            self._context.prior = None
            return
        if not any(site.sees == "image" for site in self.plan.sites.values()):
            raise InvalidRequest("These experts change no module that sees places of the picture: regions do nothing.")
        for name in regions:
            self._check_name(name)
            if name in (expert.name for expert in self.plan.always):
                raise InvalidRequest(f"{name!r} is outside the gate, so nothing weighs it by places: give no region.")
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
        for column, expert in enumerate(self.plan.columns):
            if expert.name in names:
                self._context.switches.set(column, on)
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
            [mean_gate(record.probabilities, record.places(token_mask)) for record in records.values()]
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

    @property
    def is_static(self) -> bool:
        """Do the weights depend on no input, no step and no prompt?"""
        mask = self._context.mask(self._device)
        return all(self.gate.static(block, mask) is not None for block in self.plan.blocks)

    def merge(self) -> None:
        """Put static weights into the base's weights, so that they cost nothing; masks keep working.

        Raises:
            InvalidRequest: not attached, the gate looks at its input, or regions or subsets are in force.
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

    def collapse(self, name: str = "collapsed", *, traces: Sequence[Trace] | None = None) -> Expert:
        """One ordinary LoRA of rank Σ r_i, for tools that know no gates.

        It equals a composition of static weights. Learned gates are averaged, per block, over what they said in a
        calibration run, and the result answers no longer to its input.

        Args:
            name: of the expert.
            traces: of the calibration's pictures, from :meth:`trace`; default: the last one. Static weights need none.

        Raises:
            InvalidRequest: nothing was recorded, regions or subsets are in force, or an expert is DoRA.
        """
        self._refuse_places()
        if self.is_static:
            weights = self._static_weights()
        else:
            flags = self._context.switches.flags[len(self.plan.gated) :]
            weights = trace_weights(self.plan, [self.trace()] if traces is None else traces, self._unseen(), flags)
        modules, embeddings = collapse(self.plan, weights), shared_embeddings(self.experts)
        return Expert(name, modules, base=self.experts[0].base, embeddings=embeddings)

    def _unseen(self) -> dict[str, Tensor]:
        """(N,) weights of places that no trace holds: text encoders as they are without triggers, else NLA."""
        mask = self._context.mask(self._device)
        nla = nla_weights(len(self.plan.gated), mask)
        asks = [block for block in self.plan.blocks if block.kind == "encoder" and not isinstance(self.gate, SpanGate)]
        told = {block.name: self.gate.encoder(block, Run(mask)).detach().mean((0, 1)) for block in asks}
        return {block.name: told.get(block.name, nla) for block in self.plan.blocks}

    def _refuse_merged(self, setting: Any, what: str) -> None:
        if setting is not None and self._merged is not None:
            raise InvalidRequest(f"Merged weights are the same everywhere, so {what} need unmerge() first.")

    def _refuse_places(self) -> None:
        if self._context.prior is not None or self._context.conditions.subsets is not None:
            raise InvalidRequest(
                "Regions and subsets give places and rows weights of their own, which one merged weight cannot have: "
                "call place(None) and use_subsets(None) first."
            )

    def _static_weights(self) -> dict[str, Tensor]:
        self._refuse_places()
        mask = self._context.mask(self._device)
        return column_weights(self.plan, self.gate, mask, self._context.switches.flags[len(self.plan.gated) :])

    @property
    def _device(self) -> torch.device:
        return next(iter(self.gate.state_dict().values()), torch.empty(0)).device

    # Files.

    def save(self, path: str | Path) -> Path:
        """Write gate, hashes of the experts and recipe as one safetensors file, atomically."""
        from mole_diffusion.persist import save_composition

        return save_composition(self, path)


def _check_bucket(bucket: bool, config: AnyGate) -> None:
    if bucket and isinstance(config, KLora):
        raise InvalidRequest("K-LoRA chooses by the experts' true ranks, which a bucket would pad: leave bucket off.")
