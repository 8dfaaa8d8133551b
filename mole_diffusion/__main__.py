"""``python -m mole_diffusion``: inspect LoRA files, generate pictures and export compositions.

Exit code 0 = done, 2 = refused, with one sentence on stderr that says why and what to do.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mole_diffusion.bases.names import BASES
from mole_diffusion.commands.methods import METHODS
from mole_diffusion.errors import MoleError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from mole_diffusion.bases.base import Base
    from mole_diffusion.experts import Forecast
    from mole_diffusion.generation import StepEvent

REFUSED = 2


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    arguments = _parser().parse_args(argv)
    try:
        return arguments.run(arguments)
    except MoleError as error:
        print(error, file=sys.stderr)
        return REFUSED
    except KeyboardInterrupt:
        print("Stopped.", file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m mole_diffusion", description="Compose frozen LoRAs with gates.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    _add_inspect(commands.add_parser("inspect", help="what is this file, and does it fit"))
    _add_generate(commands.add_parser("generate", help="make pictures with one or more LoRAs"))
    _add_export(commands.add_parser("export", help="one ordinary LoRA from a composition, for other tools"))
    return parser


def _add_inspect(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", type=Path, metavar="FILE")
    parser.add_argument("--header", action="store_true", help="by names, shapes and alphas alone, weights unread")
    parser.add_argument(
        "--embeddings", type=Path, metavar="FILE",
        help="token embeddings that belong to it (default: <name>_emb.safetensors beside it, where there is one)",
    )  # fmt: skip
    parser.add_argument("--base", help=f"check that it fits: {', '.join(BASES)} or a pipeline folder")
    parser.add_argument(
        "--beside", action="append", default=[], type=Path, metavar="FILE",
        help="forecast where it collides with this other LoRA; repeat for several",
    )  # fmt: skip
    parser.add_argument("--json", action="store_true", help="report as JSON")
    parser.set_defaults(run=_inspect)


def _add_generate(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--base", default="demo", help=f"{', '.join(BASES)} or a pipeline folder (default: demo)")
    parser.add_argument("--expert", action="append", default=[], metavar="NAME_OR_FILE", help="repeat for several")
    parser.add_argument("--composition", type=Path, metavar="FILE", help="trained gates; brings its experts' names")
    parser.add_argument("--router", type=Path, metavar="FILE", help="a trained router; weighs any experts of its base")
    parser.add_argument(
        "--method", choices=METHODS, metavar="METHOD", help=f"compose without trained gates: {', '.join(METHODS)}"
    )
    parser.add_argument("--weights", nargs="+", type=float, metavar="W", help="one per expert (default: 1 each)")
    parser.add_argument(
        "--region", action="append", default=[], metavar="NAME=L,T,R,B",
        help="where an expert belongs: left, top, right, bottom from 0 to 1; repeat for several",
    )  # fmt: skip
    parser.add_argument("--prompt", required=True)
    parser.add_argument("--negative", default="", help="what not to show")
    parser.add_argument("--seed", type=int, default=0, help="picture k has seed + k")
    parser.add_argument("--steps", type=int, help="denoising steps (default: the base's)")
    parser.add_argument("--guidance", type=float, help="guidance scale, 1 = off (default: the base's)")
    parser.add_argument("--count", type=int, default=1, help="number of pictures")
    parser.add_argument("--width", type=int, help="pixels (default: the base's)")
    parser.add_argument("--height", type=int, help="pixels (default: the base's)")
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder for the pictures (default: out)")
    parser.add_argument("--device", help="cpu, cuda or mps (default: the best that is there)")
    parser.add_argument("--no-scores", action="store_true", help="do not load the image-text model")
    parser.add_argument("--json", action="store_true", help="report as JSON")
    parser.set_defaults(run=_generate)


def _add_export(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("composition", type=Path, metavar="COMPOSITION")
    parser.add_argument("--format", choices=("kohya", "diffusers"), default="kohya", help="default: kohya")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE")
    parser.add_argument("--base", default="demo", help=f"{', '.join(BASES)} or a pipeline folder (default: demo)")
    parser.add_argument("--expert", action="append", default=[], metavar="NAME_OR_FILE", help="where its experts are")
    parser.add_argument(
        "--prompt", action="append", default=[],
        help="what learned gates are averaged over; repeat for several (default: its triggers on plain grounds)",
    )  # fmt: skip
    parser.add_argument("--seeds", type=int, default=2, help="pictures for each prompt (default: 2)")
    parser.add_argument("--steps", type=int, help="denoising steps (default: the base's)")
    parser.add_argument("--device", help="cpu, cuda or mps (default: the best that is there)")
    parser.add_argument("--json", action="store_true", help="report as JSON")
    parser.set_defaults(run=_export)


def _export(arguments: argparse.Namespace) -> int:
    from mole_diffusion.commands.export import ExportArguments, run_export

    asked = ExportArguments(
        composition=arguments.composition,
        format=arguments.format,
        out=arguments.out,
        base=arguments.base,
        experts=arguments.expert,
        prompts=arguments.prompt,
        seeds=arguments.seeds,
        steps=arguments.steps,
        device=arguments.device,
    )
    with _progress() as on_step:
        made = run_export(asked, on_step)
    print(json.dumps(made, indent=2) if arguments.json else made["sentence"])
    return 0


def _inspect(arguments: argparse.Namespace) -> int:
    from mole_diffusion.bases.registry import get_base
    from mole_diffusion.experts import inspect_file

    base = get_base(arguments.base) if arguments.base else None
    found = inspect_file(arguments.file, base, embeddings=arguments.embeddings or True, header_only=arguments.header)
    beside = _forecasts(arguments.file, arguments.beside, base) if found.ok else {}
    if arguments.json:
        reports = {"beside": {name: asdict(forecast) for name, forecast in beside.items()}} if arguments.beside else {}
        print(json.dumps({**found.to_json(), **reports}, indent=2))
    elif found.ok:
        print("\n".join([found.sentence(), *(forecast.sentence(name) for name, forecast in beside.items())]))
    if not found.ok:
        print(found.reason, file=sys.stderr)
    return 0 if found.ok else REFUSED


def _forecasts(file: Path, others: Sequence[Path], base: Base | None) -> dict[str, Forecast]:
    """Collisions of a file's expert with others, by their paths."""
    from mole_diffusion.experts import Expert, check_fits, forecast_collisions

    shapes = base.module_shapes() if base else None
    experts = [Expert.load(path, shapes=shapes) for path in (file, *others)] if others else []
    for expert in experts if base else []:
        check_fits(expert, base)  # type: ignore[arg-type]
    return {str(path): forecast_collisions(experts[0], other) for path, other in zip(others, experts[1:], strict=True)}


def _generate(arguments: argparse.Namespace) -> int:
    from mole_diffusion.commands.generate import GenerateArguments, run_generate

    asked = GenerateArguments(
        base=arguments.base,
        experts=arguments.expert,
        composition=arguments.composition,
        router=arguments.router,
        method=arguments.method,
        prompt=arguments.prompt,
        negative=arguments.negative,
        seed=arguments.seed,
        steps=arguments.steps,
        guidance=arguments.guidance,
        count=arguments.count,
        width=arguments.width,
        height=arguments.height,
        out=arguments.out,
        device=arguments.device,
        scores=not arguments.no_scores,
        weights=arguments.weights,
        regions=arguments.region,
    )
    with _progress() as on_step:
        made = run_generate(asked, on_step)
    if made["parameters"]["cut_off"]:
        print(f"The prompt is too long; this end of it was ignored: {made['parameters']['cut_off']}", file=sys.stderr)
    print(json.dumps(made, indent=2) if arguments.json else _summary(made))
    return 0


@contextmanager
def _progress() -> Iterator[Callable[[StepEvent], None] | None]:
    """A bar on a terminal, nothing elsewhere."""
    if not sys.stderr.isatty():
        yield None
        return
    from tqdm import tqdm

    with tqdm(unit="step", leave=False) as bar:

        def advance(event: StepEvent) -> None:
            bar.total = event.steps
            bar.update()

        yield advance


def _summary(made: dict[str, Any]) -> str:
    lines = []
    for image in made["images"]:
        scores = ", ".join(f"{name} {value:.3f}" for name, value in image["scores"].items())
        lines.append(image["path"] + (f"   alignment ({made['scorer']}): {scores}" if scores else ""))
    lines.append(f"{made['method']}, {made['seconds_per_image']:.2f} s per picture on {made['device']}")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
