"""From a request to pictures: own sampling loop, so that every step can be seen, scored and cancelled."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from threading import Event
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mole_diffusion.errors import Cancelled, InvalidRequest
from mole_diffusion.preview import Previewer, to_image
from mole_diffusion.provenance import describe_composition
from mole_diffusion.sampling import Step, initial_noise, sample

if TYPE_CHECKING:
    from PIL.Image import Image

    from mole_diffusion.bases.base import Base
    from mole_diffusion.composition import Composition
    from mole_diffusion.scoring.alignment import AlignmentScorer

MAX_COUNT = 64
MAX_STEPS = 1000
_PROMPT = "prompt"


@dataclass(frozen=True)
class SubjectPrompt:
    """What a subject is called in scores, and the words that describe it to the scorer ("a robot")."""

    name: str
    prompt: str


@dataclass(frozen=True)
class GenerationRequest:
    """What to make.

    Attributes:
        prompt, negative: what to show and what not; the negative prompt needs guidance above 1.
        seed: of the first picture; picture k of a request has seed + k and looks the same made alone.
        steps: denoising steps.
        guidance: classifier-free guidance scale; 1 and below = off; None = the base's.
        width, height: pixels; None = the base's resolution.
        count: pictures.
        subjects: what to score at every step beside the whole prompt.
        score_every, preview_every: steps between scores and previews; the last step has both; 0 = never.
        guidance_rescale: φ of arXiv 2305.08891, 0…1; None = the base's.
    """

    prompt: str
    negative: str = ""
    seed: int = 0
    steps: int = 25
    guidance: float | None = None
    width: int | None = None
    height: int | None = None
    count: int = 1
    subjects: tuple[SubjectPrompt, ...] = ()
    score_every: int = 1
    preview_every: int = 1
    guidance_rescale: float | None = None

    def __post_init__(self) -> None:
        _within("steps", self.steps, 1, MAX_STEPS)
        _within("count", self.count, 1, MAX_COUNT)
        _within("seed", self.seed, 0, 2**63 - 1 - MAX_COUNT)
        if self.guidance is not None:
            _within("guidance", self.guidance, 0, 100)
        _within("score_every", self.score_every, 0, MAX_STEPS)
        _within("preview_every", self.preview_every, 0, MAX_STEPS)
        if self.guidance_rescale is not None:
            _within("guidance_rescale", self.guidance_rescale, 0, 1)
        names = [subject.name for subject in self.subjects]
        if len({*names, _PROMPT}) != len(names) + 1:
            raise InvalidRequest(f"Subjects need different names, none of them {_PROMPT!r}: got {', '.join(names)}.")

    @property
    def seeds(self) -> tuple[int, ...]:
        """One per picture."""
        return tuple(self.seed + index for index in range(self.count))

    @property
    def guided(self) -> bool:
        """Whether unconditional rows are computed; every base's own guidance needs them."""
        return self.guidance is None or self.guidance > 1

    def sampling(self, base: Base) -> tuple[float, float]:
        """(guidance, guidance_rescale), the base's own where the request leaves them open."""
        return (
            base.default_guidance if self.guidance is None else self.guidance,
            base.guidance_rescale if self.guidance_rescale is None else self.guidance_rescale,
        )


def _within(name: str, value: float, low: float, high: float) -> None:
    if (isinstance(value, float) and not math.isfinite(value)) or not low <= value <= high:
        raise InvalidRequest(f"Expected {name} between {low} and {high}, got {value}.")


@dataclass(frozen=True)
class StepEvent:
    """After one denoising step.

    Attributes:
        step, steps: 1-based number of the step, and of how many.
        preview: how the first picture would look if it ended here; None where no preview was due.
        alignment: cosine of that picture with ``prompt`` and with each subject's prompt; empty where none was due.
    """

    step: int
    steps: int
    preview: Image | None
    alignment: dict[str, float]


@dataclass(frozen=True)
class GenerationResult:
    """The pictures; the events of the run without their previews; everything needed to make the pictures again."""

    images: tuple[Image, ...]
    events: tuple[StepEvent, ...]
    parameters: dict[str, Any]
    scores: tuple[dict[str, float], ...] = ()
    seconds: float = 0.0

    def parameters_of(self, index: int) -> dict[str, Any]:
        """Parameters that make picture ``index`` alone."""
        own = {"seed": self.parameters["seed"] + index, "count": 1}
        return {**self.parameters, **own, "scores": self.parameters["scores"][index : index + 1]}


OnStep = Callable[[StepEvent], None]


def generate(
    pipe: Any,
    base: Base,
    request: GenerationRequest,
    *,
    composition: Composition | None = None,
    scorer: AlignmentScorer | None = None,
    on_step: OnStep | None = None,
    cancel: Event | None = None,
) -> GenerationResult:
    """Make the pictures of a request.

    Args:
        pipe: the base's pipeline; left as it was.
        base: what the pipeline is.
        request: what to make.
        composition: experts and gates on that pipeline; attached for the run if it is not attached already.
        scorer: image-text model for the scores at every step and of the finished pictures.
        on_step: called after every step, in this thread.
        cancel: when set, the run ends before the next step.

    Raises:
        Cancelled: ``cancel`` was set.
        InvalidRequest: the size does not suit the base.
    """
    started = time.perf_counter()
    placed = nullcontext() if composition is None or composition.attached else composition
    with placed, torch.no_grad():
        run = _Run(pipe, base, request, scorer, on_step, cancel)
        pictures = run.pictures()
    scores = run.score(pictures)
    return GenerationResult(
        images=tuple(to_image(picture) for picture in pictures),
        events=tuple(run.events),
        parameters=_parameters(pipe, base, request, composition, scorer, scores),
        scores=scores,
        seconds=time.perf_counter() - started,
    )


@dataclass
class _Run:
    pipe: Any
    base: Base
    request: GenerationRequest
    scorer: AlignmentScorer | None
    on_step: OnStep | None
    cancel: Event | None
    events: list[StepEvent] = field(default_factory=list)

    def pictures(self) -> Tensor:
        """Finished pictures (B, 3, H, W) in 0…1 on the CPU."""
        request, shape = self.request, self.base.latent_shape(self.request.height, self.request.width)
        negatives = [request.negative] * request.count if request.guided else None
        size = (request.height or self.base.resolution, request.width or self.base.resolution)
        self._check_cancel()
        conditioning = self.base.encode(self.pipe, [request.prompt] * request.count, negatives=negatives, size=size)
        guidance, rescale = request.sampling(self.base)
        previewer = Previewer(self.base, self.pipe)
        latents = initial_noise(request.seeds, shape)
        for step in sample(self.pipe, latents, conditioning, request.steps, guidance, rescale):
            latents = step.latents
            self._emit(step, previewer)
            self._check_cancel()
        return previewer.decode(latents)

    def score(self, pictures: Tensor) -> tuple[dict[str, float], ...]:
        """Per picture: cosine with the prompt and with every subject's prompt; empty without a scorer."""
        if self.scorer is None:
            return ()
        texts = {_PROMPT: self.request.prompt} | {subject.name: subject.prompt for subject in self.request.subjects}
        rows = self.scorer.score(pictures, list(texts.values())).tolist()
        return tuple(dict(zip(texts, row, strict=True)) for row in rows)

    def _emit(self, step: Step, previewer: Previewer) -> None:
        request = self.request
        scored = self.scorer is not None and _due(step.index, request.steps, request.score_every)
        shown = self.on_step is not None and _due(step.index, request.steps, request.preview_every)
        picture = None
        if scored or shown:
            picture = previewer.decode(step.x0[:1]) if scored else previewer.quick(step.x0[:1])
        event = StepEvent(
            step=step.index + 1,
            steps=request.steps,
            preview=to_image(picture[0]) if shown and picture is not None else None,
            alignment=self.score(picture)[0] if scored and picture is not None else {},
        )
        self.events.append(replace(event, preview=None))
        if self.on_step is not None:
            self.on_step(event)

    def _check_cancel(self) -> None:
        if self.cancel is not None and self.cancel.is_set():
            raise Cancelled("The generation was stopped on request.")


def _due(index: int, steps: int, every: int) -> bool:
    return every > 0 and ((index + 1) % every == 0 or index + 1 == steps)


def _parameters(
    pipe: Any,
    base: Base,
    request: GenerationRequest,
    composition: Composition | None,
    scorer: AlignmentScorer | None,
    scores: tuple[dict[str, float], ...],
) -> dict[str, Any]:
    """Everything needed to make the pictures again, as plain values for JSON."""
    guidance, rescale = request.sampling(base)
    return {
        "schema": 1,
        # Pictures are shared: a folder is named, its path is nobody's business.
        "base": Path(base.name).name,
        "source": Path(base.name).name if base.is_local else base.source,
        "revision": base.revision,
        "prompt": request.prompt,
        "negative": request.negative,
        "cut_off": base.cut_off(pipe, request.prompt),
        "seed": request.seed,
        "count": request.count,
        "steps": request.steps,
        "guidance": guidance,
        "guidance_rescale": rescale,
        "width": request.width or base.resolution,
        "height": request.height or base.resolution,
        "sampler": type(pipe.scheduler).__name__,
        "precision": str(pipe.unet.dtype).removeprefix("torch."),
        "composition": None if composition is None else describe_composition(composition),
        "scorer": None if scorer is None else scorer.label,
        "scores": list(scores),
    }
