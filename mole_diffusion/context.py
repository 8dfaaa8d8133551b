"""The running state of an attached composition: computes each place's weights once and hands them to its layers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mole_diffusion.errors import InvalidRequest
from mole_diffusion.functional import nla_weights, resample, timestep_features, to_maps, token_grid, with_prior
from mole_diffusion.gates.block import TIME_WIDTH
from mole_diffusion.gates.features import concatenated
from mole_diffusion.gates.protocol import BlockSpec, Gate, Run, Sight
from mole_diffusion.hosts import Step
from mole_diffusion.layers import ComposedConv2d, ComposedLinear
from mole_diffusion.plan import Plan, Site
from mole_diffusion.prompts import Conditions
from mole_diffusion.trace import Recorder

Layer = ComposedLinear | ComposedConv2d
Grid = tuple[int, int]
_INPUTS = ("hidden_states", "input_tensor", "x")


@dataclass
class State:
    """What one place's gate said in the running forward pass; (rows or 1, places or 1, N), before the gain."""

    probabilities: Tensor
    run: Run
    grid: Grid = (1, 1)
    gain: Tensor | None = None
    text: State | None = None


@dataclass(frozen=True)
class Record:
    """What a gate said in the last forward pass: probabilities before the gain, (rows or 1, L or 1, N)."""

    probabilities: Tensor
    gain: Tensor | None
    grid: Grid
    spans: Tensor | None = None

    @property
    def weights(self) -> Tensor:
        """What the experts get: probabilities times gain."""
        return self.probabilities if self.gain is None else self.probabilities * self.gain


class Context:
    """Answers composed layers (:class:`mole_diffusion.layers.Weigher`) and hears what the models do
    (:class:`mole_diffusion.hosts.Listener`).

    With gradient checkpointing a block's weights are computed again inside the block's recomputation, from the same
    inputs; so one call of the main model must be followed by its backward pass before the next call.

    Attributes:
        active: one bool per gated expert.
        always_on: one bool per expert outside the gate.
        frozen_out: layers answer with the base alone (weights are merged into it).
        prior: (1 or rows, N, h, w) where each expert belongs, or None.
    """

    def __init__(self, plan: Plan, gate: Gate, attended: Any = None) -> None:
        self.plan = plan
        self.gate = gate
        self.heard = attended
        self.active = [True] * len(plan.gated)
        self.always_on = [True] * len(plan.always)
        self.conditions = Conditions()
        self.frozen_out = False
        self.prior: Tensor | None = None
        self.records: dict[str, Record] = {}
        self.recorder = Recorder()
        self.latent: Grid = (1, 1)
        self.steps = 0
        self._states: dict[str, State] = {}
        self._run: Run | None = None
        self._forced: Tensor | None = None
        self._cache: dict[tuple[Any, ...], Tensor] = {}
        self._blocks = {block.name: block for block in plan.blocks}

    @property
    def idle(self) -> bool:
        """Nothing to do: the base alone."""
        return self.frozen_out or not any(self.active + self.always_on)

    def mask(self, device: torch.device | str = "cpu") -> Tensor:
        """(N,) bool over the gated experts."""
        return torch.tensor(self.active, device=device)

    def announce(self, conditions: Conditions) -> None:
        """The next batches come from these prompts."""
        self.conditions = conditions
        self.recorder.reset()
        self.steps = 0

    def clear(self) -> None:
        """Forget the last forward pass."""
        self._states.clear()
        self._cache.clear()
        self.records.clear()
        self._run = None

    # Layers ask.

    def weights(self, layer: Layer, x: Tensor) -> Tensor | None:
        """See :class:`mole_diffusion.layers.Weigher`."""
        if self._off(layer):
            return None
        site = self.plan.sites[layer.key]
        state = self._state(site.block, layer, x)
        if site.sees == "text" and site.block.kind != "encoder":
            state = self._text(site.block, state, layer, x)
        grid = layer.grid(x) if isinstance(layer, ComposedConv2d) else None
        shaped = self._shaped(site, state, x, grid)
        return layer.bank.pick(shaped, axis=-1 if grid is None else 1)

    def _off(self, layer: Layer) -> bool:
        if self.frozen_out:
            return True
        active = self.active + self.always_on
        return not any(active[column] for column in layer.bank.columns)

    def _shaped(self, site: Site, state: State, x: Tensor, grid: Grid | None) -> Tensor:
        """Weights over all columns for one input, (rows, places, columns), or (rows, columns, h, w) for a grid.

        Modules of one place share them, where no graph is recorded.
        """
        if torch.is_grad_enabled() or site.block.kind == "matrix":
            return self._columns(state, site.sees, x, grid)
        form = grid or ("row" if x.ndim == 2 else x.shape[1] if site.sees == "image" else site.sees)
        key = (site.block.name, id(state), form)
        if key not in self._cache:
            self._cache[key] = self._columns(state, site.sees, x, grid)
        return self._cache[key]

    def _columns(self, state: State, sees: str, x: Tensor, grid: Grid | None) -> Tensor:
        values, here = state.probabilities, state.grid
        if sees == "row" or (x.ndim == 2 and grid is None):
            values, here = values.mean(1, keepdim=True), (1, 1)
        elif sees == "image" and grid is not None:
            values, here = resample(to_maps(values, here), grid).flatten(2).mT, grid
        elif sees == "image" and values.shape[1] not in (1, x.shape[1]):
            raise InvalidRequest(
                f"A gate per place saw {values.shape[1]} places, but a module of its block got {x.shape[1]}: choose "
                "the scope sample, or the granularity matrix, for this model."
            )
        if sees == "image" and self.prior is not None:
            values, here = self._placed(values, here if values.shape[1] > 1 else None, x, grid)
        if state.gain is not None:
            values = values * state.gain
        if self.always_on:
            always = values.new_tensor([float(on) for on in self.always_on])
            values = torch.cat([values, always.expand(*values.shape[:-1], -1)], -1)
        return values if grid is None else to_maps(values, here)

    def _placed(self, values: Tensor, here: Grid | None, x: Tensor, grid: Grid | None) -> tuple[Tensor, Grid]:
        """Weights under the prior; a weight for all places becomes one for each."""
        assert self.prior is not None
        cells = here or grid or token_grid(x.shape[1], self.latent)
        prior = F.adaptive_avg_pool2d(self.prior.to(values.device), cells).flatten(2).mT
        return with_prior(values, prior, self.gate.total), cells

    def _state(self, block: BlockSpec, layer: Layer, x: Tensor) -> State:
        if self._forced is not None:
            assert self._run is not None
            return State(self._forced, self._run)
        state = self._states.get(block.name)
        lazy = self.gate.looks == "site" and block.kind not in ("network", "encoder")
        if lazy and (state is None or block.kind == "matrix"):
            state = self._look(block, layer, x)
        if state is None:
            raise InvalidRequest(f"{block.name} ran outside its model's forward pass: call the whole model.")
        return state

    def _look(self, block: BlockSpec, layer: Layer, x: Tensor) -> State:
        """The gate looks at the first module that runs in its place."""
        run = self._running()
        site = self.plan.sites[layer.key]
        if site.sees == "text" and not block.image:
            return self._enter(block, None, (1, 1))  # only its text side has targets
        sight, grid = self._sight(layer, x)
        if isinstance(layer, ComposedLinear):
            grid = token_grid(sight.hidden.shape[1], self.latent)
        return self._enter(block, self.gate.image(block, sight, run), grid)

    def _sight(self, layer: Layer, x: Tensor) -> tuple[Sight, Grid]:
        """What there is to see at one module, tokens in the last dimension but one; on the grid of its output."""
        down = layer.down(x)
        if isinstance(layer, ComposedConv2d):
            grid = (down.shape[2], down.shape[3])
            hidden, down = (self._take(resample(maps, grid).flatten(2).mT) for maps in (x, down))
        else:
            grid = (1, 1)
            hidden, down = (self._take(t.unsqueeze(1) if t.ndim == 2 else t) for t in (x, down))
        return Sight(hidden, down, layer.bank, key=layer.key), grid

    def _text(self, block: BlockSpec, state: State, layer: Layer, x: Tensor) -> State:
        if self._forced is not None:
            return state
        if state.text is None:
            spec = self._blocks[block.name]
            sight = self._sight(layer, x)[0] if self.gate.looks == "site" else Sight(self._take(x), key=layer.key)
            weights = self.gate.text(spec, sight, state.run)
            if weights is None:
                state.text = replace(state, probabilities=state.probabilities.mean(1, keepdim=True), text=None)
            else:
                gain = self.gate.gain(spec, True)
                self._record(f"{block.name}:text", weights, gain, (1, weights.shape[1]), state.run.spans)
                state.text = State(weights, state.run, gain=gain)
        return state.text

    # Models tell.

    def begin(self, step: Step) -> None:
        """The main model starts: learn the batch, weigh what looks at nothing."""
        self.clear()
        if self.idle:
            return
        self._follow(step.device)
        rows = self.conditions.rows(step.rows, self.reuse)
        spans = None
        if self.gate.needs_spans and any(expert.trigger for expert in self.plan.gated):
            assert step.text is not None
            spans = self.conditions.spans_for(step.rows, self.reuse, step.text.shape[1]).to(step.device)
        self.latent = step.latent
        mask = self.conditions.mask_for(self.mask(step.device), step.rows, self.reuse)
        times, text, places = (None if t is None else t[-rows:] for t in (step.times, step.text, step.places))
        time = None if times is None else timestep_features(times, TIME_WIDTH)
        self._run = Run(mask, time, text, spans, places, self.steps, times, step.horizon)
        for block in self.plan.blocks:
            if block.kind == "network":
                self._enter(block, self.gate.network(block, self._run), (1, 1))
            elif block.kind != "encoder" and self.gate.looks == "nothing":
                self._enter(block, self.gate.image(block, None, self._run), (1, 1))

    def end(self) -> None:
        """The main model has finished: hand the weights to the recorder."""
        self.steps += 1
        if self._run is not None:
            self.recorder.add({name: (record.weights, record.grid) for name, record in self.records.items()})

    def enter(self, name: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Forward pre-hook of a gated place: weigh its experts by its input, (B, L, d) or (B, C, H, W)."""
        if self.idle or self._run is None or self._forced is not None:
            return
        self._cache.clear()
        if self.gate.looks == "site":  # the first module in it will look
            self._states.pop(name, None)
            return
        hidden = args[0] if args else next(kwargs[key] for key in _INPUTS if key in kwargs)
        tokens, grid = self._tokens(hidden)
        block = self._blocks[name]
        sight = Sight(self._take(tokens))
        if self.gate.looks == "outputs":
            outputs = self._outputs(module, args, kwargs)
            if hidden.ndim == 4:
                grid = (outputs[0].shape[2], outputs[0].shape[3])
            sight = Sight(sight.hidden, outputs=concatenated([self._take(self._tokens(out)[0]) for out in outputs]))
        self._enter(block, self.gate.image(block, sight, self._run), grid)

    def encode(self, component: str, spans: Tensor | None, places: torch.device) -> None:
        """A text encoder starts."""
        self._cache.clear()
        block = self._blocks.get(component)
        if self.idle or block is None:
            return
        self._follow(places)
        run = Run(self.mask(places), spans=spans)
        self._states[component] = State(self.gate.encoder(block, run), run)

    def hear(self, prompts: Sequence[str] | None, guidance: bool) -> None:
        """The pipeline encodes prompts."""
        if self.heard is not None:
            self.heard(prompts, guidance)

    @property
    def reuse(self) -> bool:
        """Do unconditional rows take the conditional rows' weights?"""
        return self.conditions.guidance and self.gate.guidance_rows == "reuse"

    def _running(self) -> Run:
        if self._run is None:
            raise InvalidRequest("A composed module ran outside its model's forward pass: call the whole model.")
        return self._run

    def _outputs(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
        """The block's output with each expert alone (Eq. 7-8), N passes."""
        run = self._running()
        outputs = []
        with self._alone():
            for expert in range(run.experts):
                one_hot = torch.zeros(1, 1, run.experts, device=run.mask.device)
                one_hot[..., expert] = 1.0
                self._forced = one_hot
                self._cache.clear()
                found = module.forward(*args, **kwargs)
                outputs.append(found[0] if isinstance(found, tuple) else found)
        self._cache.clear()
        return outputs

    @contextmanager
    def _alone(self) -> Any:
        try:
            yield
        finally:
            self._forced = None

    def _enter(self, block: BlockSpec, weights: Tensor | None, grid: Grid) -> State:
        run = self._running()
        if weights is None:
            nla = nla_weights(run.experts, run.mask)
            state = State(nla if nla.ndim == 3 else nla.expand(1, 1, -1), run, grid)
        else:
            gain = self.gate.gain(block, False)
            self._record(block.name, weights, gain, grid, None)
            state = State(weights, run, grid, gain)
        self._states[block.name] = state
        return state

    def _record(self, name: str, weights: Tensor, gain: Tensor | None, grid: Grid, spans: Tensor | None) -> None:
        if name not in self.records:
            self.records[name] = Record(weights, gain, grid, spans)

    def _tokens(self, hidden: Tensor) -> tuple[Tensor, Grid]:
        if hidden.ndim == 4:
            return hidden.flatten(2).mT, (hidden.shape[2], hidden.shape[3])
        tokens = hidden.unsqueeze(1) if hidden.ndim == 2 else hidden
        return tokens, token_grid(tokens.shape[1], self.latent)

    def _take(self, x: Tensor) -> Tensor:
        return x[x.shape[0] // 2 :] if self.reuse else x

    def _follow(self, device: torch.device) -> None:
        """Gates live where the model runs."""
        gate = self.gate
        assert isinstance(gate, nn.Module)
        held = next(iter(gate.state_dict().values()), None)
        if held is not None and held.device != device:
            gate.to(device)


def block_hook(context: Context, name: str) -> Any:
    """The forward pre-hook of one place."""

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        context.enter(name, module, args, dict(kwargs))

    return hook
