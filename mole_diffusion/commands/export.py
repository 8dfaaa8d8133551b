"""``export``: a composition as one ordinary LoRA file, for tools that know no gates."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from mole_diffusion.bases.registry import get_base
from mole_diffusion.commands.resolve import compose_experts, load_experts
from mole_diffusion.errors import InvalidRequest

if TYPE_CHECKING:
    from mole_diffusion.bases.base import Base
    from mole_diffusion.composition import Composition
    from mole_diffusion.generation import StepEvent
    from mole_diffusion.trace import Trace


@dataclass(frozen=True)
class ExportArguments:
    """What was asked for; ``steps`` and ``device``: None = the base's, the best that is there."""

    composition: Path
    format: Literal["kohya", "diffusers"]
    out: Path
    base: str
    experts: Sequence[str]
    prompts: Sequence[str]
    seeds: int
    steps: int | None
    device: str | None


def run_export(arguments: ExportArguments, on_step: Callable[[StepEvent], None] | None = None) -> dict[str, Any]:
    """Collapse and save; returns what was made, as plain values for JSON.

    Raises:
        MoleError: the composition cannot be read or collapsed; nothing is written then.
    """
    if not arguments.composition.is_file():
        raise InvalidRequest(f"Expected a composition at {arguments.composition}, found none.")
    if arguments.seeds < 1:
        raise InvalidRequest(f"seeds must be at least 1, got {arguments.seeds}.")
    base = get_base(arguments.base)
    experts = load_experts(arguments.experts, base)

    from mole_diffusion.bases.device import choose_placement
    from mole_diffusion.experts import save_expert

    placement = choose_placement(arguments.device)
    pipe = base.load(placement.device, placement.dtype)
    composition, _ = compose_experts(pipe, base, experts, file=arguments.composition)
    assert composition is not None
    prompts: Sequence[str] = ()
    if composition.is_static:
        expert = composition.collapse(arguments.out.stem)
    else:
        prompts = arguments.prompts or default_prompts(composition)
        traces = _traces(pipe, base, composition, arguments, prompts, on_step)
        expert = composition.collapse(arguments.out.stem, traces=traces)
    path = save_expert(expert, arguments.out, format=arguments.format)
    over = f", gates averaged over {len(prompts)} prompts × {arguments.seeds} seeds" if prompts else ""
    return {
        "path": str(path),
        "format": arguments.format,
        "experts": list(composition.names),
        "rank": max(expert.ranks),
        "modules": len(expert.modules),
        "prompts": list(prompts),
        "seeds": arguments.seeds if prompts else 0,
        "sentence": f"{path}: {' + '.join(composition.names)} as one LoRA, {expert.rank_summary}{over}.",
    }


def default_prompts(composition: Composition) -> list[str]:
    """All triggers in one sentence, on four plain grounds and in both orders."""
    words = [expert.trigger or expert.name for expert in composition.experts if expert.role != "accelerator"]
    grounds = ("white", "blue", "green", "yellow")
    return [
        f"a {' and a '.join(words if index % 2 == 0 else words[::-1])} on a {ground} background"
        for index, ground in enumerate(grounds)
    ]


def _traces(
    pipe: Any,
    base: Base,
    composition: Composition,
    arguments: ExportArguments,
    prompts: Sequence[str],
    on_step: Callable[[StepEvent], None] | None,
) -> list[Trace]:
    from mole_diffusion.generation import GenerationRequest, generate

    traces = []
    for prompt in prompts:
        request = GenerationRequest(
            prompt=prompt,
            steps=base.default_steps if arguments.steps is None else arguments.steps,
            count=arguments.seeds,
            score_every=0,
            preview_every=0,
        )
        generate(pipe, base, request, composition=composition, on_step=on_step)
        traces.append(composition.trace())
    return traces
