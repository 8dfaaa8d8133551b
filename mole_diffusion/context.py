"""The running state of an attached composition: computes each place's weights once and hands them to its layers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import chain
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
from mole_diffusion.records import Grid, Record, State
from mole_diffusion.regions import check_grid
from mole_diffusion.switches import Switches
from mole_diffusion.trace import Recorder

Layer = ComposedLinear | ComposedConv2d
_PLACES = ("transformer", "resnet", "layer")
_INPUTS = ("hidden_states", "input_tensor", "x")


class Context:
    """Answers composed layers (:class:`mole_diffusion.layers.Weigher`) and hears what the models do
    (:class:`mole_diffusion.hosts.Listener`).

    With gradient checkpointing a block's weights are computed again inside the block's recomputation, from the same
    inputs; so one call of the main model must be followed by its backward pass before the next call.

    Attributes:
        switches: which experts are on.
        frozen_out: layers answer with the base alone (weights are merged into it).
        prior: (1 or rows, N, h, w) where each expert belongs, or None.
    """

    def __init__(self, plan: Plan, gate: Gate, attended: Any = None) -> None:
        self.adopt(plan)
        self.gate = gate
        self.heard = attended
        self.switches = Switches(len(plan.gated), len(plan.always))
        self.conditions = Conditions()
        self.frozen_out = False
        self.prior: Tensor | None = None
        self.records: dict[str, Record] = {}
        self.recorder = Recorder()
        self.latent: Grid = (1, 1)
        self.steps = 0
        self._states: dict[str, State] = {}
        self._kept: dict[str, State] = {}
        self._run: Run | None = None
        self._runs: dict[str, Run] = {}
        self._forced: Tensor | None = None
        self._cache: dict[tuple[Any, ...], Tensor] = {}

    def adopt(self, plan: Plan) -> None:
        """These are the experts from now on."""
        self.plan = plan
        self._blocks = {block.name: block for block in plan.blocks}
        self._triggered = any(expert.trigger for expert in plan.gated)  # compiled graphs ask this, not the words

    @property
    def idle(self) -> bool:
        """Nothing to do: the base alone."""
        return self.frozen_out or not self.switches.any

    def mask(self, device: torch.device) -> Tensor:
        """(N,) bool over the gated experts."""
        return self.switches.mask(device)

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
        self._kept = {}
        self._run = None
        self._runs.clear()
        self._forced = None

    @property
    def run(self) -> Run | None:
        """What the running pass of the main model offers to gates; None where there is nothing to weigh."""
        return self._run

    def force(self, weights: Tensor | None) -> None:
        """The main model goes on with these weights in every place, (rows or 1, 1, N); None = with the gate's again."""
        self._forced = weights
        self._cache.clear()

    # Layers ask.

    def weights(self, layer: Layer, x: Tensor) -> Tensor | None:
        """See :class:`mole_diffusion.layers.Weigher`."""
        site = self.plan.sites[layer.key]
        if self._off(layer):
            if self.gate.looks == "site" and site.block.kind in _PLACES and not self.idle:
                self._state(site.block, layer, x)  # masks do not move the place at which a gate looks
            return None
        state = self._state(site.block, layer, x)
        if site.sees == "text" and site.block.kind != "encoder":
            state = self._text(site.block, state, layer, x)
        grid = layer.grid(x) if isinstance(layer, ComposedConv2d) else None
        shaped = self._shaped(site, state, x, grid)
        return layer.bank.pick(shaped, axis=-1 if grid is None else 1)

    def _off(self, layer: Layer) -> bool:
        return self.frozen_out or not self.switches.any_of(layer.bank.columns)

    def _shaped(self, site: Site, state: State, x: Tensor, grid: Grid | None) -> Tensor:
        """Weights over all columns for one input, (rows, places, columns), or (rows, columns, h, w) for a grid.

        Modules of one place share them, where no graph is recorded.
        """
        if torch.is_grad_enabled() or site.block.kind == "matrix":
            return self._columns(state, site.sees, x, grid)
        form = grid or ("row" if x.ndim == 2 else x.shape[1] if site.sees == "image" else site.sees)
        key = (site.block.name, site.sees, form)
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
        if sees == "image" and self.prior is not None and (grid is not None or x.ndim == 3):
            values, here = self._placed(values, here if values.shape[1] > 1 else None, x, grid)
        if state.gain is not None:
            values = values * state.gain
        if self.plan.always:
            always = self.switches.all(values.device)[self.switches.gated :].to(values.dtype)
            values = torch.cat([values, always.expand(*values.shape[:-1], -1)], -1)
        return values if grid is None else to_maps(values, here)

    def _placed(self, values: Tensor, here: Grid | None, x: Tensor, grid: Grid | None) -> tuple[Tensor, Grid]:
        """Weights under the prior; a weight for all places becomes one for each."""
        assert self.prior is not None
        cells = here or grid or token_grid(x.shape[1], self.latent)
        if grid is None:
            check_grid(cells, self.latent)
        prior = F.adaptive_avg_pool2d(self.prior.to(values.device), cells).flatten(2).mT
        return with_prior(values, prior, self.gate.total), cells

    def _state(self, block: BlockSpec, layer: Layer, x: Tensor) -> State:
        if self._forced is not None and block.kind != "encoder":
            assert self._run is not None
            return State(self._forced, self._run)
        state = self._states.get(block.name)
        lazy = self.gate.looks == "site" and block.kind not in ("network", "encoder") and block.name not in self._kept
        due = state is not None and state.waits and self.plan.sites[layer.key].sees != "text"
        if lazy and (state is None or block.kind == "matrix" or state.looker == layer.key or due):
            state = self._look(block, layer, x)
            state.looker = layer.key
        if state is None:
            raise InvalidRequest(f"{block.name} ran outside its model's forward pass: call the whole model.")
        return state

    def _look(self, block: BlockSpec, layer: Layer, x: Tensor) -> State:
        """The gate looks at the first module that runs in its place."""
        run = self._running(block.name)
        site = self.plan.sites[layer.key]
        before = self._states.get(block.name)
        if site.sees == "text" and not self.gate.pools:
            state = self._enter(block, None, (1, 1), run)
            state.waits = True
            return state
        sight, grid = self._sight(layer, x)
        if isinstance(layer, ComposedLinear):
            grid = token_grid(sight.hidden.shape[1], self.latent)
        state = self._enter(block, self.gate.image(block, sight, run), grid, run)
        if before is not None and before.waits:
            state.text = before.text
            self._cache.clear()
        return state

    def _sight(self, layer: Layer, x: Tensor) -> tuple[Sight, Grid]:
        """What there is to see at one module, tokens in the last dimension but one; on the grid of its output."""
        site = self.plan.sites[layer.key]
        x, places = self._running(site.block.name).seen(x, self.gate.pools, text=site.sees == "text")
        down = layer.down(x)
        if isinstance(layer, ComposedConv2d):
            grid = (down.shape[2], down.shape[3])
            hidden, down = (self._take(resample(maps, grid).flatten(2).mT) for maps in (x, down))
        else:
            grid = (1, 1)
            hidden, down = (self._take(t.unsqueeze(1) if t.ndim == 2 else t) for t in (x, down))
        return Sight(hidden, down, layer.bank, key=layer.key, places=places), grid

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
        kept = dict(self._states) if step.after == "prompt" and self.gate.pools else {}
        if step.after != "part":
            self.clear()
        if self.idle:
            return
        if step.after == "prompt" and step.text is None and self._asks_prompt:
            raise InvalidRequest(
                "This pass goes on from a prompt that no gate saw: start from the prompt with the composition attached."
            )
        self._cache.clear()
        self._states.update(kept)
        self._kept = kept
        self._follow(step.device)
        rows = self.conditions.rows(step.rows, self.reuse)
        spans = None
        if self.gate.needs_spans and self._triggered:
            assert step.text is not None
            spans = step.spans
            if spans is None:
                spans = self.conditions.spans_for(step.rows, self.reuse, step.text.shape[1]).to(step.device)
        self.latent = step.latent
        mask = self.conditions.mask_for(self.mask(step.device), step.rows, self.reuse)
        offered = (step.times, step.text, step.places, step.text_places)
        times, text, places, text_places = (None if t is None else t[-rows:] for t in offered)
        time = None if times is None else timestep_features(times * (1000 / step.horizon), TIME_WIDTH)
        run = Run(mask, time, text, spans, places, self.steps, times, step.horizon, text_places, step.memory)
        self._run = run
        for block in self.plan.blocks:
            if block.kind == "network":
                self._enter(block, self.gate.network(block, run), (1, 1), run)
            elif block.kind != "encoder" and self.gate.looks == "nothing":
                self._enter(block, self.gate.image(block, None, run), (1, 1), run)

    def end(self) -> None:
        """The main model has finished: hand the weights to the recorder."""
        self.steps += 1
        if self._run is not None and not torch.compiler.is_compiling():  # each longer list would be another graph
            self.recorder.add({name: (record.weights, record.grid) for name, record in self.records.items()})

    def enter(self, name: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Forward pre-hook of a gated place: weigh its experts by its input, (B, L, d) or (B, C, H, W)."""
        if self.idle or self._run is None or self._forced is not None or name in self._kept:
            return
        self._cache.clear()
        if self.gate.looks == "site":  # the first module in it will look
            self._states.pop(name, None)
            return
        hidden = args[0] if args else next(kwargs[key] for key in _INPUTS if key in kwargs)
        tokens, grid = self._tokens(hidden)
        block, run = self._blocks[name], self._running(name)
        seen, places = run.seen(tokens, self.gate.pools)
        sight = Sight(self._take(seen), places=places)
        if self.gate.looks == "outputs":
            outputs = [self._tokens(output) for output in self._outputs(run, hidden, module, args, kwargs)]
            found, grid = concatenated([self._take(tokens) for tokens, _ in outputs]), outputs[0][1]
            sight = Sight(self._take(tokens), outputs=found, places=run.places)
        self._enter(block, self.gate.image(block, sight, run), grid, run)

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

    def _running(self, name: str) -> Run:
        """What the pass offers to a place; when checkpointing computes it again, what it offered the first time."""
        if self._run is None:
            raise InvalidRequest("A composed module ran outside its model's forward pass: call the whole model.")
        return self._runs.setdefault(name, self._run)

    @property
    def _asks_prompt(self) -> bool:
        network = any(block.kind == "network" for block in self.plan.blocks)
        return self.gate.looks != "nothing" and (self.gate.pools or network)

    def _outputs(
        self, run: Run, hidden: Tensor, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> list[Tensor]:
        """The block's output with each expert alone (Eq. 7-8), N passes; of several outputs the one like ``hidden``.

        Raises:
            InvalidRequest: every pass would write into a cache of keys and values.
        """
        if kwargs.get("past_key_values") is not None:
            raise InvalidRequest(
                "A gate that looks at every expert's output runs each block several times, which would fill the cache "
                "several times: pass use_cache=False, or choose another input for the gate."
            )
        outputs = []
        with self._alone():
            for expert in range(run.experts):
                one_hot = torch.zeros(1, 1, run.experts, device=run.mask.device)
                one_hot[..., expert] = 1.0
                self._forced = one_hot
                self._cache.clear()
                found = module.forward(*args, **kwargs)
                parts = found if isinstance(found, tuple) else (found,)
                like = (part for part in parts if part is not None and part.shape[:2] == hidden.shape[:2])
                outputs.append(next(like, parts[0]))
        self._cache.clear()
        return outputs

    @contextmanager
    def _alone(self) -> Any:
        try:
            yield
        finally:
            self._forced = None

    def _enter(self, block: BlockSpec, weights: Tensor | None, grid: Grid, run: Run) -> State:
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
        held = next(chain(gate.parameters(), gate.buffers()), None)
        if held is not None and held.device != device:
            gate.to(device)


def block_hook(context: Context, name: str) -> Any:
    """The forward pre-hook of one place."""

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        context.enter(name, module, args, dict(kwargs))

    return hook
