"""``generate``: pictures of a base with experts, written as PNG files that carry their parameters."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mole_diffusion.bases.registry import get_base
from mole_diffusion.commands.methods import COMBINED, check_regions, choose, parse_regions, place
from mole_diffusion.commands.resolve import compose_experts, load_experts
from mole_diffusion.errors import InvalidRequest

if TYPE_CHECKING:
    from mole_diffusion.bases.base import Base
    from mole_diffusion.experts import Expert
    from mole_diffusion.gates.config import AnyGate
    from mole_diffusion.generation import GenerationRequest, GenerationResult, StepEvent


@dataclass(frozen=True)
class GenerateArguments:
    """What was asked for; None = the base's default."""

    base: str
    experts: Sequence[str]
    composition: Path | None
    method: str | None
    prompt: str
    negative: str
    seed: int
    steps: int | None
    guidance: float | None
    count: int
    width: int | None
    height: int | None
    out: Path
    device: str | None
    scores: bool
    weights: Sequence[float] | None = None
    regions: Sequence[str] = ()
    router: Path | None = None


def run_generate(arguments: GenerateArguments, on_step: Callable[[StepEvent], None] | None = None) -> dict[str, Any]:
    """Make and save the pictures; returns what was made, as plain values for JSON."""
    method = arguments.method or (None if arguments.weights is None else "sum")
    if arguments.composition is not None and method is not None:
        raise InvalidRequest(
            "A composition brings its own gates: give either --composition or --method, and --weights with the latter."
        )
    if arguments.composition is not None and not arguments.composition.is_file():
        raise InvalidRequest(f"Expected a composition at {arguments.composition}, found none.")
    if arguments.router is not None and (arguments.composition is not None or method is not None):
        raise InvalidRequest("A router weighs the experts itself: give it without --composition, --method, --weights.")
    base = get_base(arguments.base)
    request = _request(arguments, base)
    base.latent_shape(request.height, request.width)
    regions = parse_regions(arguments.regions)
    experts = load_experts(arguments.experts, base)
    chosen = None if method is None else choose(experts, method, arguments.weights)
    if arguments.router is not None:
        chosen, method = _routed(experts, arguments.router, base), f"router {arguments.router.name}"
    check_regions(regions, method, bool(experts or arguments.composition))

    from mole_diffusion.bases.device import choose_placement
    from mole_diffusion.composition import compose
    from mole_diffusion.generation import generate

    placement = choose_placement(arguments.device)
    scorer = _scorer(base) if arguments.scores else None
    pipe = base.load(placement.device, placement.dtype)
    if method is not None and chosen is not None:
        composition = compose(pipe, chosen[0], gate=chosen[1], base=base)
    else:
        composition, method = compose_experts(pipe, base, experts, file=arguments.composition)
    place(composition, regions)
    result = generate(pipe, base, request, composition=composition, scorer=scorer, on_step=on_step)
    return _save(result, _record(arguments, method, regions, experts), arguments.out, placement.reason)


def _routed(experts: Sequence[Expert], file: Path, base: Base) -> tuple[list[Expert], AnyGate]:
    from mole_diffusion.gates.router_file import load_router

    if not any(expert.role != "accelerator" for expert in experts):
        raise InvalidRequest("A router weighs experts: name them with --expert.")
    return list(experts), load_router(file, base)


def _record(
    arguments: GenerateArguments, method: str, regions: Mapping[str, Any], experts: Sequence[Expert]
) -> dict[str, Any]:
    """How the experts were composed, as far as the composition itself does not say it."""
    record: dict[str, Any] = {"method": method}
    if regions:
        record["regions"] = {name: list(box) for name, box in regions.items()}
    if method in COMBINED:
        gated = [expert for expert in experts if expert.role != "accelerator"]
        record["combined"] = [{"name": expert.name, "sha256": expert.sha256} for expert in gated]
        record["weights"] = [1.0] * len(gated) if arguments.weights is None else list(arguments.weights)
    return record


def _request(arguments: GenerateArguments, base: Base) -> GenerationRequest:
    from mole_diffusion.generation import GenerationRequest

    return GenerationRequest(
        prompt=arguments.prompt,
        negative=arguments.negative,
        seed=arguments.seed,
        steps=base.default_steps if arguments.steps is None else arguments.steps,
        guidance=base.default_guidance if arguments.guidance is None else arguments.guidance,
        width=arguments.width,
        height=arguments.height,
        count=arguments.count,
        score_every=0,
        preview_every=0,
    )


def _scorer(base: Base) -> Any:
    from mole_diffusion.scoring.alignment import load_alignment

    return load_alignment(base)


def _save(result: GenerationResult, record: dict[str, Any], folder: Path, device: str) -> dict[str, Any]:
    from mole_diffusion.png import save_png

    images = []
    for index, image in enumerate(result.images):
        parameters = {**result.parameters_of(index), **record}
        path = save_png(image, _free_path(folder, parameters["seed"]), parameters)
        scores = result.scores[index] if result.scores else {}
        images.append({"path": str(path), "seed": parameters["seed"], "scores": scores})
    return {
        "images": images,
        "seconds_per_image": result.seconds / len(images),
        "method": record["method"],
        "device": device,
        "scorer": result.parameters["scorer"],
        "parameters": result.parameters,
    }


def _free_path(folder: Path, seed: int) -> Path:
    """A name that no picture has yet: earlier ones are never overwritten."""
    number, path = 1, folder / f"seed-{seed}.png"
    while path.exists():
        number += 1
        path = folder / f"seed-{seed}-{number}.png"
    return path
