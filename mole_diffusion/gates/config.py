"""What a gate should be: frozen settings; unknown fields and contradictions raise."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from itertools import pairwise
from typing import Any, ClassVar, Literal

from mole_diffusion.errors import InvalidRequest

GuidanceRows = Literal["reuse", "own"]
Granularity = Literal["matrix", "layer", "block", "network"]
MAX_KEYFRAMES = 1000
_LARGEST = 3.4e38  # of fp32
GRANULARITIES = ("block", "layer", "matrix", "network")


@dataclass(frozen=True)
class GateConfig:
    """Learned gates (MoLE).

    Attributes:
        granularity: "block" = one gate per BasicTransformerBlock and ResnetBlock2D; targets outside any block share
            one gate named "network" that sees the timestep and the pooled text. "layer" = one for each of attn1,
            attn2, feed-forward and ResNet; "matrix" = one per module; "network" = the one gate for everything.
        input: what gates look at. "hidden" = the block's own input; "energy" = log ‖s_i·B_i·A_i·x‖² of every expert in
            the block's first module, which does not change with the basis that a LoRA happens to use;
            "expert_outputs" = the block's output with each expert alone (Eq. 7-9: N passes through every block, slow);
            "flattened" = the same, not pooled, straight to the logits (Eq. 10: N²·L·d weights per gate and no hidden
            layer), for latents of one size.
        scope: "sample" = one weight per expert and image (the paper); "token" = one per expert and place.
        scale: "softmax" (Eq. 11); "null" = softmax with one more expert that does nothing; "sigmoid" = independent.
        gain: one learned factor per gate, 1 at the start.
        temperature: τ at the start; learned per gate.
        hidden: width of each gate's hidden layer.
        timestep: let the gate see the diffusion timestep.
        guidance_rows: with guidance, unconditional rows "reuse" the conditional rows' weights or compute their "own".
        text_prior: start value of the learned weight that a trigger's own tokens add to its expert's logit (token
            scope, keys and values of cross-attention); 0 = start at NLA.
        text_encoder: weights of experts of the text encoders: "nla", or "span" = 1 on the expert's own trigger.
        latent: height and width of the latents, of the input "flattened" only.
    """

    granularity: Granularity = "block"
    scope: Literal["sample", "token"] = "sample"
    scale: Literal["softmax", "null", "sigmoid"] = "softmax"
    gain: bool = False
    temperature: float = 1.0
    hidden: int = 64
    timestep: bool = True
    guidance_rows: GuidanceRows = "reuse"
    text_prior: float = 0.0
    text_encoder: Literal["nla", "span"] = "nla"
    input: Literal["hidden", "energy", "expert_outputs", "flattened"] = "hidden"
    latent: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        _one_of("granularity", self.granularity, GRANULARITIES)
        _one_of("input", self.input, ("hidden", "energy", "expert_outputs", "flattened"))
        if self.granularity == "network" and (self.scope == "token" or self.input != "hidden"):
            raise InvalidRequest(
                "The gate of the whole network sees the timestep and the prompt alone: choose the scope sample and the "
                "input hidden with it, or a finer granularity."
            )
        if self.granularity == "matrix" and self.input in ("expert_outputs", "flattened"):
            raise InvalidRequest("Outputs of experts are those of whole layers or blocks: choose one of these.")
        _one_of("scope", self.scope, ("sample", "token"))
        _one_of("scale", self.scale, ("softmax", "null", "sigmoid"))
        _one_of("guidance_rows", self.guidance_rows, ("reuse", "own"))
        _one_of("text_encoder", self.text_encoder, ("nla", "span"))
        for name in ("gain", "timestep"):
            _one_of(name, getattr(self, name), (True, False))
        self._check_latent()
        if not (_is_number(self.temperature) and 1e-3 <= self.temperature <= 1e3):
            raise InvalidRequest(f"temperature must be between 0.001 and 1000, got {self.temperature!r}.")
        if not (type(self.hidden) is int and 1 <= self.hidden <= 4096):
            raise InvalidRequest(f"hidden must be a whole number between 1 and 4096, got {self.hidden!r}.")
        if not (_is_number(self.text_prior) and abs(self.text_prior) <= 100):
            raise InvalidRequest(f"text_prior must be a number between -100 and 100, got {self.text_prior!r}.")

    def _check_latent(self) -> None:
        if (self.input == "flattened") != (self.latent is not None) or (self.latent and self.scope == "token"):
            raise InvalidRequest(
                "The input flattened needs latent, the height and width of the latents, and the scope sample; no other "
                "input has it."
            )
        if self.latent is not None:
            object.__setattr__(self, "latent", tuple(self.latent))  # JSON has lists
            if len(self.latent) != 2 or not all(type(side) is int and 1 <= side <= 4096 for side in self.latent):
                raise InvalidRequest(f"latent must be two whole numbers between 1 and 4096, got {self.latent!r}.")


@dataclass(frozen=True)
class StaticWeights:
    """Weights that see no input: sum, NLA, per-block numbers, a collapsed gate.

    Attributes:
        weights: one number per gated expert; or block name → such numbers, where "*" stands for every block that is
            not named. Blocks are those of :class:`GateConfig`, "network", "text_encoder" and "text_encoder_2".
        learnable: train one free vector per block, from these start values.
        redistribute: a masked expert's weight goes to the others in proportion; off for plain sums.
        granularity: what a "block" is, as in :class:`GateConfig`.
    """

    weights: Sequence[float] | Mapping[str, Sequence[float]]
    learnable: bool = False
    redistribute: bool = True
    granularity: Granularity = "block"

    def __post_init__(self) -> None:
        _one_of("granularity", self.granularity, GRANULARITIES)
        object.__setattr__(self, "weights", _frozen(self.weights))


@dataclass(frozen=True)
class TriggerSpans:
    """Training-free: keys and values of cross-attention (and text encoders) give an expert weight 1 on the tokens of
    its own trigger and NLA on the others; every other module gets NLA.
    """

    guidance_rows: GuidanceRows = "reuse"
    granularity: ClassVar[Granularity] = "block"

    def __post_init__(self) -> None:
        _one_of("guidance_rows", self.guidance_rows, ("reuse", "own"))


@dataclass(frozen=True)
class RouterConfig:
    """RouterLoRA (arXiv 2406.16989): a router per module that does not know how many experts there are, so that it
    weighs experts which it never saw: w = softmax_i(⟨A_r·x, B_rᵀ·v_i⟩ / √rank / τ) with v_i = s_i·B_i·A_i·x.

    Attributes:
        rank: of A_r and B_r.
        scope: "token" = weights per place (the paper); "sample" = scores averaged over places.
        temperature: τ at the start; learned per module.
        guidance_rows: as in :class:`GateConfig`.
    """

    rank: int = 8
    scope: Literal["token", "sample"] = "token"
    temperature: float = 1.0
    guidance_rows: GuidanceRows = "reuse"
    granularity: ClassVar[Granularity] = "matrix"

    def __post_init__(self) -> None:
        _one_of("scope", self.scope, ("token", "sample"))
        _one_of("guidance_rows", self.guidance_rows, ("reuse", "own"))
        if not (type(self.rank) is int and 1 <= self.rank <= 1024):
            raise InvalidRequest(f"rank must be a whole number between 1 and 1024, got {self.rank!r}.")
        if not (_is_number(self.temperature) and 1e-3 <= self.temperature <= 1e3):
            raise InvalidRequest(f"temperature must be between 0.001 and 1000, got {self.temperature!r}.")


@dataclass(frozen=True)
class ScheduledWeights:
    """Static weights that change while the picture forms.

    Text encoders, which run once, get the mean over the progress from 0 to 1.

    Attributes:
        keyframes: (progress, weights) pairs in rising order; the progress is 0 at pure noise … 1 at the picture, the
            weights are as in :class:`StaticWeights`. The first pair also counts before it, the last also after it.
        interpolate: "hold" = a keyframe's weights until the next one; "linear" = on the straight line between them.
        redistribute, granularity: as in :class:`StaticWeights`.
    """

    keyframes: Sequence[tuple[float, Sequence[float] | Mapping[str, Sequence[float]]]]
    interpolate: Literal["hold", "linear"] = "hold"
    redistribute: bool = True
    granularity: Granularity = "block"

    def __post_init__(self) -> None:
        _one_of("granularity", self.granularity, GRANULARITIES)
        _one_of("interpolate", self.interpolate, ("hold", "linear"))
        _one_of("redistribute", self.redistribute, (True, False))
        frames = tuple((progress, _frozen(weights)) for progress, weights in self.keyframes)
        times = [progress for progress, _ in frames]
        if not 0 < len(times) <= MAX_KEYFRAMES or not all(_is_number(time) and 0 <= time <= 1 for time in times):
            raise InvalidRequest(
                f"Scheduled weights need 1 to {MAX_KEYFRAMES} keyframes, each with a progress from 0 (noise) to 1 (the "
                f"picture), got the progress {times[:8]!r}."
            )
        if any(later <= earlier for earlier, later in pairwise(times)):
            raise InvalidRequest(f"The progress of keyframes must rise from one to the next, got {times[:8]!r}.")
        object.__setattr__(self, "keyframes", frames)


@dataclass(frozen=True)
class LoraSwitch:
    """LoRA Switch (arXiv 2402.16843): one expert at a time, the next one every ``every`` steps, in the experts' order
    and round again; see :class:`mole_diffusion.gates.switch.Turns`.

    Attributes:
        every: steps, that is calls of the main model, until the next expert's turn (τ of the paper).
        weights: strength of each expert in its turn; () = 1 each.
    """

    every: int = 1
    weights: Sequence[float] = ()
    granularity: ClassVar[Granularity] = "block"

    def __post_init__(self) -> None:
        if not (type(self.every) is int and 1 <= self.every <= 10_000):
            raise InvalidRequest(f"every must be a whole number between 1 and 10000, got {self.every!r}.")
        object.__setattr__(self, "weights", _strengths(self.weights))


@dataclass(frozen=True)
class LoraComposite:
    """LoRA Composite (arXiv 2402.16843): every step averages what the model predicts with each expert alone; costs one
    pass of the main model per active expert; see :class:`mole_diffusion.gates.composite.Apart`.

    Attributes:
        weights: strength of each expert in its own pass; () = 1 each.
    """

    weights: Sequence[float] = ()
    granularity: ClassVar[Granularity] = "block"

    def __post_init__(self) -> None:
        object.__setattr__(self, "weights", _strengths(self.weights))


@dataclass(frozen=True)
class KLora:
    """K-LoRA (arXiv 2502.18461) for two experts, a subject and a style: every place takes one of the two in every step;
    see :class:`mole_diffusion.gates.klora.TopK`.

    Attributes:
        alpha, beta: the style's largest elements count alpha · progress + beta times, so it wins late.
        granularity: "matrix" = every module chooses; "layer" = the modules of a layer choose together.
    """

    alpha: float = 1.5
    beta: float = 0.5
    granularity: Granularity = "matrix"

    def __post_init__(self) -> None:
        _one_of("granularity", self.granularity, ("matrix", "layer"))
        for name in ("alpha", "beta"):
            value = getattr(self, name)
            if not (_is_number(value) and 0 <= value <= 1e6):
                raise InvalidRequest(f"{name} must be a number between 0 and 1000000, got {value!r}.")


AnyGate = (
    GateConfig | StaticWeights | TriggerSpans | RouterConfig | ScheduledWeights | LoraSwitch | LoraComposite | KLora
)
_KINDS: dict[str, type[AnyGate]] = {
    "learned": GateConfig,
    "static": StaticWeights,
    "trigger_spans": TriggerSpans,
    "router": RouterConfig,
    "scheduled": ScheduledWeights,
    "switch": LoraSwitch,
    "composite": LoraComposite,
    "klora": KLora,
}


def nla(count: int) -> StaticWeights:
    """Normalised linear arithmetic (Eq. 2): 1/N each."""
    return StaticWeights((1.0 / count,) * count)


def weighted_sum(weights: int | Sequence[float]) -> StaticWeights:
    """Plain sum (Eq. 1): 1 each, or the given factors; masking one expert leaves the others alone."""
    return StaticWeights((1.0,) * weights if isinstance(weights, int) else tuple(weights), redistribute=False)


def learned_static(count: int) -> StaticWeights:
    """One free vector per block, from NLA: the baseline that tells whether looking at the input helps."""
    return StaticWeights((1.0 / count,) * count, learnable=True)


def gate_to_json(gate: AnyGate) -> dict[str, Any]:
    """Plain values, with the kind."""
    kind = next(name for name, cls in _KINDS.items() if isinstance(gate, cls))
    return {"kind": kind, **asdict(gate)}


def gate_from_json(content: Mapping[str, Any]) -> AnyGate:
    """The reverse of :func:`gate_to_json`.

    Raises:
        InvalidRequest: unknown kind, unknown or ill-typed field.
    """
    kind = content.get("kind")
    if not isinstance(kind, str) or kind not in _KINDS:
        raise InvalidRequest(f"Expected a gate of the kind {', '.join(_KINDS)}, got {kind!r}.")
    known = {field.name for field in fields(_KINDS[kind])}
    unknown = sorted(set(content) - known - {"kind"})
    if unknown:
        raise InvalidRequest(f"Unknown settings of a {kind} gate: {', '.join(map(str, unknown))}.")
    try:
        return _KINDS[kind](**{key: value for key, value in content.items() if key != "kind"})
    except (TypeError, AttributeError, ValueError, OverflowError) as error:
        raise InvalidRequest(f"The settings of this {kind} gate are malformed: {error}.") from error


def _one_of(name: str, value: Any, allowed: tuple[str | bool, ...]) -> None:
    if type(value) is not type(allowed[0]) or value not in allowed:
        raise InvalidRequest(f"{name} must be {' or '.join(map(str, allowed))}, got {value!r}.")


def _frozen(weights: Any) -> tuple[float, ...] | dict[str, tuple[float, ...]]:
    """One row of static weights, or a row per block, as plain floats."""
    rows = list(weights.values()) if isinstance(weights, Mapping) else [weights]
    if len({len(row) for row in rows}) != 1:
        raise InvalidRequest("Every block of static weights needs one number per expert.")
    if not all(_is_number(value) for row in rows for value in row):
        raise InvalidRequest("Static weights must be finite numbers.")
    if isinstance(weights, Mapping):
        return {str(block): tuple(map(float, row)) for block, row in weights.items()}
    return tuple(map(float, weights))


def _strengths(weights: Any) -> tuple[float, ...]:
    if not isinstance(weights, Sequence) or not all(_is_number(value) for value in weights):
        raise InvalidRequest(f"weights must be one finite number per expert, got {weights!r}.")
    return tuple(map(float, weights))


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= _LARGEST
