"""The running state of an attached composition: computes each block's weights once and hands them to its layers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mole_diffusion.errors import InvalidRequest
from mole_diffusion.functional import nla_weights, resample, timestep_features, to_maps, token_grid, trigger_spans
from mole_diffusion.gates.block import TIME_WIDTH
from mole_diffusion.gates.protocol import BlockSpec, Gate, Run
from mole_diffusion.layers import ExpertBank
from mole_diffusion.plan import Plan
from mole_diffusion.prompts import Conditions
from mole_diffusion.trace import Recorder


@dataclass
class State:
    """Weights of one block in the running forward pass, over all columns: (B or 1, L or 1, columns)."""

    image: Tensor
    run: Run
    grid: tuple[int, int] = (1, 1)
    text: Tensor | None = None


@dataclass(frozen=True)
class Record:
    """What a gate said in the last forward pass: probabilities before the gain, (rows or 1, L or 1, N)."""

    probabilities: Tensor
    gain: Tensor | None
    grid: tuple[int, int]
    spans: Tensor | None = None

    @property
    def weights(self) -> Tensor:
        """What the experts get: probabilities times gain."""
        return self.probabilities if self.gain is None else self.probabilities * self.gain


class Context:
    """Answers composed layers (:class:`mole_diffusion.layers.Weigher`) and listens to the models' forward hooks.

    With gradient checkpointing a block's weights are computed again inside the block's recomputation, from the same
    inputs; so one UNet call must be followed by its backward pass before the next UNet call.

    Attributes:
        active: one bool per gated expert.
        always_on: one bool per accelerator.
        frozen_out: layers answer with the base alone (weights are merged into it).
    """

    def __init__(self, plan: Plan, gate: Gate) -> None:
        self.plan = plan
        self.gate = gate
        self.active = [True] * len(plan.gated)
        self.always_on = [True] * len(plan.always)
        self.conditions = Conditions()
        self.frozen_out = False
        self.records: dict[str, Record] = {}
        self.recorder = Recorder()
        self.latent = (1, 1)
        self._triggers: Mapping[str, list[list[int]]] = {}
        self._states: dict[str, State] = {}
        self._run: Run | None = None
        self._reuse = False
        self._cache: dict[tuple[Any, ...], Tensor] = {}
        self._blocks = {block.name: block for block in plan.blocks}

    @property
    def idle(self) -> bool:
        """Nothing to do: the base alone."""
        return self.frozen_out or not any(self.active + self.always_on)

    def mask(self, device: torch.device | str = "cpu") -> Tensor:
        """(N,) bool over the gated experts."""
        return torch.tensor(self.active, device=device)

    def set_triggers(self, triggers: Mapping[str, list[list[int]]]) -> None:
        """Trigger token ids per text encoder."""
        self._triggers = triggers

    def clear(self) -> None:
        """Forget the last forward pass."""
        self._states.clear()
        self._cache.clear()
        self.records.clear()
        self._run = None

    # Layers ask.

    def linear(self, key: str, bank: ExpertBank, x: Tensor) -> Tensor | None:
        """Weights (…, R) for A·x of a linear layer, None = the base alone."""
        if self._off(bank):
            return None
        site = self.plan.sites[key]
        weights = self._text(site.block, x) if site.sees == "text" else self._state(site.block).image
        if x.ndim == 2:
            return self._expanded(bank, weights, "row")
        return self._expanded(bank, weights, "mean" if site.sees == "row" else "tokens")

    def conv(self, key: str, bank: ExpertBank, down: tuple[int, int]) -> Tensor | None:
        """Weights (B|1, R, H|1, W|1) for A·x of a convolution, None = the base alone."""
        if self._off(bank):
            return None
        state = self._state(self.plan.sites[key].block)
        return self._expanded(bank, state.image, down, state.grid)

    def _off(self, bank: ExpertBank) -> bool:
        if self.frozen_out:
            return True
        active = self.active + self.always_on
        return not any(active[column] for column in bank.columns)

    def _expanded(self, bank: ExpertBank, weights: Tensor, form: Any, grid: tuple[int, int] = (1, 1)) -> Tensor:
        """Weights per rank; reused by layers of one block with the same experts, where no graph is recorded."""
        key = (id(weights), bank.columns, bank.ranks, form)
        if key in self._cache:
            return self._cache[key]
        if isinstance(form, tuple):
            gates = resample(to_maps(weights, grid), form).index_select(1, bank.owners)
        else:
            chosen = weights if form == "tokens" else weights.mean(1, keepdim=form == "mean")
            gates = chosen.index_select(-1, bank.owners)
        if not torch.is_grad_enabled():
            self._cache[key] = gates
        return gates

    def _state(self, block: BlockSpec) -> State:
        state = self._states.get(block.name)
        if state is None:
            raise InvalidRequest(f"{block.name} ran outside its model's forward pass: call the whole UNet or encoder.")
        return state

    def _text(self, block: BlockSpec, text: Tensor) -> Tensor:
        state = self._state(block)
        if block.kind == "encoder":
            return state.image
        if state.text is None:
            spec = self._blocks[block.name]
            weights = self.gate.text(spec, self._take(text), state.run)
            if weights is None:
                state.text = state.image
            else:
                state.text = self._finish(spec, weights, f"{block.name}:text", (1, weights.shape[1]), state.run)
        return state.text

    # Models tell.

    def before_unet(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Forward pre-hook of the UNet: learn the batch, weigh what no block weighs."""
        self.clear()
        if self.idle:
            return
        names = ("sample", "timestep", "encoder_hidden_states")
        sample, timestep, text = (args[i] if i < len(args) else kwargs[name] for i, name in enumerate(names))
        self._follow(sample.device)
        batch = sample.shape[0]
        self._reuse = self.conditions.guidance and self.gate.guidance_rows == "reuse"
        rows = self.conditions.rows(batch, self._reuse)
        spans = None
        if self.gate.needs_spans and any(expert.trigger for expert in self.plan.gated):
            spans = self.conditions.spans_for(batch, self._reuse, text.shape[1]).to(sample.device)
        times = torch.as_tensor(timestep, device=sample.device).reshape(-1).expand(batch)[-rows:]
        self.latent = (sample.shape[-2], sample.shape[-1])
        self._run = Run(self.mask(sample.device), timestep_features(times, TIME_WIDTH), text[-rows:], spans)
        for block in self.plan.blocks:
            if block.kind == "network":
                self._enter(block, self.gate.network(block, self._run), (1, 1))
            elif block.kind != "encoder" and not self.gate.dynamic:
                self._enter(block, self.gate.image(block, None, self._run), (1, 1))

    def after_unet(self) -> None:
        """Forward hook of the UNet: hand the weights to the recorder."""
        if self._run is not None:
            self.recorder.add({name: (record.weights, record.grid) for name, record in self.records.items()})

    def before_block(self, name: str, hidden: Tensor) -> None:
        """Forward pre-hook of a gated block: weigh its experts by its input, (B, L, d) or (B, C, H, W)."""
        if self.idle or self._run is None:
            return
        self._cache.clear()
        if hidden.ndim == 4:
            tokens, grid = hidden.flatten(2).transpose(1, 2), (hidden.shape[2], hidden.shape[3])
        else:
            tokens, grid = hidden, token_grid(hidden.shape[1], self.latent)
        block = self._blocks[name]
        self._enter(block, self.gate.image(block, self._take(tokens), self._run), grid)

    def before_encoder(self, component: str, ids: Tensor) -> None:
        """Forward pre-hook of a text encoder: find the triggers in its ids (B, T)."""
        self._cache.clear()
        if self.idle:
            return
        self._follow(ids.device)
        spans = trigger_spans(ids, self._triggers[component]) if component in self._triggers else None
        run = Run(self.mask(ids.device), spans=spans)
        weights = self.gate.encoder(self._blocks[component], run)
        self._states[component] = State(self._all_columns(weights), run)

    def _enter(self, block: BlockSpec, weights: Tensor | None, grid: tuple[int, int]) -> None:
        run = self._run
        assert run is not None
        if weights is None:
            image = self._all_columns(nla_weights(run.mask.numel(), run.mask).expand(1, 1, -1))
        else:
            image = self._finish(block, weights, block.name, grid, run)
        self._states[block.name] = State(image, run, grid)

    def _finish(self, block: BlockSpec, weights: Tensor, record: str, grid: tuple[int, int], run: Run) -> Tensor:
        """Record, apply the gain, give unconditional rows their share, add the always-on columns."""
        text = record.endswith(":text")
        gain = self.gate.gain(block, text)
        if record not in self.records:
            self.records[record] = Record(weights, gain, grid, run.spans if text else None)
        weights = weights if gain is None else weights * gain
        if self._reuse and weights.shape[0] > 1:
            weights = torch.cat([weights, weights])
        return self._all_columns(weights)

    def _all_columns(self, weights: Tensor) -> Tensor:
        if not self.always_on:
            return weights
        always = weights.new_tensor([float(on) for on in self.always_on])
        return torch.cat([weights, always.expand(*weights.shape[:-1], -1)], -1)

    def _take(self, x: Tensor) -> Tensor:
        return x[x.shape[0] // 2 :] if self._reuse else x

    def _follow(self, device: torch.device) -> None:
        """Gates live where the model runs."""
        gate = self.gate
        assert isinstance(gate, nn.Module)
        held = next(iter(gate.state_dict().values()), None)
        if held is not None and held.device != device:
            gate.to(device)
