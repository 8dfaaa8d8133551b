"""What a composed UNet call costs, beside the base and beside other tools."""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import platform
import statistics
import sys
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from tests.benchmarks.contenders import COMPILED, CONTENDERS, PAPER_LIMIT, XLORA_LIMIT, Contender, Maker, Skipped
from tests.benchmarks.measure import MAX_ROUNDS, MIN_ROUNDS, Memory, paired, quartiles
from tests.benchmarks.sizes import SIZES, Stage
from tests.benchmarks.switching import FIELDS, switching

COUNTS = (1, 2, 3, 8, 16, 64)
ATTACH_COUNTS = (3, 57)
BUDGET_S = 25.0
EPILOG = f"""
contenders: base; merged = static NLA in the weights; peft = set_adapters with 1/N; xlora = X-LoRA's way, two passes
through PEFT's layers, up to N = {XLORA_LIMIT}; paper = MoLE's gate to the letter, up to N = {PAPER_LIMIT};
ours_sample, ours_token = learned block gates. Without --rounds a row gets as many rounds as fit into {BUDGET_S:.0f} s,
between {MIN_ROUNDS} and {MAX_ROUNDS}. Gates hold random numbers while they are timed; traces are recorded.
"""


def row(stage: Stage, count: int, makers: Mapping[str, Maker], rounds: int | None, progress: Any) -> dict[str, Any]:
    """All contenders with ``count`` experts.

    Returns:
        n, rounds, ``<contender>_s`` = median seconds, or None where ``skipped`` says why; by contender: quartiles_s;
        ratio = median over rounds of its time by the base's in the same round; held_mb and peak_mb beside the base's
        weights; difference = largest deviation from ``merged`` by the largest output, gates still uniform (the
        paper's gate computes something else and has none); restored = the UNet's output after detaching is the
        base's, bit for bit.
    """
    experts = stage.experts(count)
    torch.compiler.reset()  # torch compiles one function a limited number of times
    entered: dict[str, Contender] = {}
    outputs: dict[str, Tensor] = {}
    skipped: dict[str, str] = {}
    held: dict[str, float] = {}
    peak: dict[str, float | None] = {}
    for name, maker in makers.items():
        progress.set_postfix_str(f"N={count} {name}")
        memory = Memory(stage.device)
        try:
            contender = maker(stage, experts)
            outputs[name] = contender.call()
        except Skipped as reason:
            skipped[name] = str(reason)
            continue
        entered[name] = contender
        held[name] = (memory.held() - contender.aside) / 1e6
        highest = memory.peak(contender.call)
        peak[name] = None if highest is None else (highest - contender.aside) / 1e6
        contender.randomise(stage.seed)
    progress.set_postfix_str(f"N={count} timing")
    calls = {name: contender.call for name, contender in entered.items()}
    times = paired(calls, stage.device, rounds=rounds, budget_s=BUDGET_S, seed=stage.seed)
    restored = {name: _restored(contender, outputs["base"]) for name, contender in entered.items()}
    return {
        "n": count,
        "rounds": len(times["base"]),
        **{f"{name}_s": statistics.median(times[name]) if name in times else None for name in makers},
        "ratio": {name: _ratio(values, times["base"]) for name, values in times.items()},
        "quartiles_s": {name: quartiles(values) for name, values in times.items()},
        "held_mb": held,
        "peak_mb": peak,
        "difference": _differences(outputs),
        "restored": {name: value for name, value in restored.items() if value is not None},
        "skipped": skipped,
    }


def report(arguments: argparse.Namespace) -> dict[str, Any]:
    """Everything that was asked for, as plain values."""
    stage = Stage(arguments.size, arguments.device, rank=arguments.rank, batch=arguments.batch, seed=arguments.seed)
    makers = {**CONTENDERS, **(COMPILED if arguments.compile else {})}
    steps = len(arguments.counts) + 2 * len(arguments.attach_counts)
    rows: list[dict[str, Any]] = []
    attached: list[dict[str, Any]] = []
    finished = False
    with (
        contextlib.suppress(KeyboardInterrupt),  # whoever stops a long run keeps the rows that are done
        tqdm(total=steps, file=sys.stderr, desc=f"{arguments.size} on {arguments.device}") as progress,
    ):
        for count in arguments.counts:
            rows.append(row(stage, count, makers, arguments.rounds, progress))
            gc.collect()
            progress.update()
        progress.set_postfix_str("attaching and switching")
        for found in switching(stage, arguments.attach_counts):
            attached.append(found)
            progress.update()
        finished = True
    return {
        "device": _device_name(stage.device),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": {name: version(name) for name in ("torch", "diffusers", "peft")},
        "threads": torch.get_num_threads(),
        "settings": {
            **vars(arguments),
            "dtype": str(stage.dtype).removeprefix("torch."),
            "latents": list(stage.inputs["sample"].shape),
            "parameters": sum(parameter.numel() for parameter in stage.pipe.unet.parameters()),
            "guidance": True,
        },
        "finished": finished,
        "rows": rows,
        "attach": attached,
    }


def _differences(outputs: Mapping[str, Tensor]) -> dict[str, float]:
    wanted = outputs["merged"].float()
    compared = {name: output.float() for name, output in outputs.items() if name not in ("merged", "paper")}
    size = wanted.abs().max()
    return {name: float((output - wanted).abs().max() / size) for name, output in compared.items()}


def _ratio(values: Sequence[float], base: Sequence[float]) -> float:
    return statistics.median(value / other for value, other in zip(values, base, strict=True))


def _restored(contender: Contender, wanted: Tensor) -> bool | None:
    if contender.undo is None or contender.bare is None:
        return None
    contender.undo()
    return torch.equal(contender.bare(), wanted)


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    named = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return next(named, platform.processor() or platform.machine())


def tables(found: Mapping[str, Any]) -> str:
    """The report as text: seconds with quartiles and multiples of the base, memory, attaching."""
    settings = found["settings"]
    names = [
        key.removesuffix("_s") for key in (found["rows"] or [{}])[0] if key.endswith("_s") and key != "quartiles_s"
    ]
    parts = [
        f"{settings['size']}, {settings['dtype']}, latents {settings['latents']}, rank {settings['rank']}, "
        f"{found['device']}, {found['threads']} threads, torch {found['versions']['torch']}, {found['date']}",
        "milliseconds per UNet call: median [quartiles] ×base",
        _grid(["N", "rounds", *names], [[item["n"], item["rounds"], *_cells(item, names)] for item in found["rows"]]),
        "megabytes beside the base's weights: held / peak in a call",
        _grid(["N", *names], [[item["n"], *_memory(item, names)] for item in found["rows"]]),
    ]
    worst = max(
        (value for item in found["rows"] for name, value in item["difference"].items() if name in AGREE), default=0
    )
    kept = all(value for item in found["rows"] for value in item["restored"].values())
    parts.append(f"largest deviation from merged: {worst:.1e}; UNets restored bit for bit: {'yes' if kept else 'NO'}")
    parts += [f"N = {item['n']}: {name} {why}" for item in found["rows"] for name, why in item["skipped"].items()]
    if found["attach"]:
        lines = [[item["tool"], item["n"], *(f"{item[field]:.3f}" for field in FIELDS)] for item in found["attach"]]
        parts += ["seconds; *_call_s = first UNet call afterwards", _grid(["tool", "N", *FIELDS], lines)]
    return "\n\n".join(parts)


AGREE = tuple(name for name in (*CONTENDERS, *COMPILED) if name not in ("base", "compiled_base", "merged", "paper"))


def _cells(item: Mapping[str, Any], names: Sequence[str]) -> list[str]:
    return [_cell(item, name) if name in item["ratio"] else "–" for name in names]


def _cell(item: Mapping[str, Any], name: str) -> str:
    low, high = item["quartiles_s"][name]
    return f"{1e3 * item[f'{name}_s']:.0f} [{1e3 * low:.0f}, {1e3 * high:.0f}] ×{item['ratio'][name]:.2f}"


def _memory(item: Mapping[str, Any], names: Sequence[str]) -> list[str]:
    def text(value: float | None) -> str:
        return "–" if value is None else f"{value:.0f}"

    return [f"{text(item['held_mb'].get(name))} / {text(item['peak_mb'].get(name))}" for name in names]


def _grid(head: Sequence[Any], lines: Sequence[Sequence[Any]]) -> str:
    cells = [[str(cell) for cell in line] for line in (head, *lines)]
    widths = [max(len(line[column]) for line in cells) for column in range(len(head))]
    return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) for line in cells)


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(
        prog="python -m tests.benchmarks.composition",
        description=__doc__,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    made.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    made.add_argument("--size", choices=tuple(SIZES), default="small", help="sd21 and sdxl: true sizes, random weights")
    made.add_argument("--json", action="store_true", help="print JSON instead of tables")
    made.add_argument(
        "--counts", type=_positive, nargs="+", default=list(COUNTS), metavar="N", help="numbers of experts"
    )
    made.add_argument(
        "--attach-counts",
        type=_positive,
        nargs="*",
        default=list(ATTACH_COUNTS),
        metavar="N",
        help="none = leave it out",
    )
    made.add_argument("--rounds", type=_positive, help="default: as many as fit")
    made.add_argument("--rank", type=_positive, default=16)
    made.add_argument("--batch", type=_even, default=2, help="rows, half of them unconditional")
    made.add_argument("--seed", type=int, default=0)
    made.add_argument("--threads", type=_positive, help="threads of torch on the processor")
    made.add_argument("--compile", action="store_true", help="also base and ours under torch.compile")
    return made


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 1, got {text!r}")
    return int(text)


def _even(text: str) -> int:
    if _positive(text) % 2:
        raise argparse.ArgumentTypeError(f"expected an even number, got {text!r}")
    return int(text)


def main(argv: Sequence[str] | None = None) -> int:
    """Run, print, return the exit code."""
    made = parser()
    arguments = made.parse_args(argv)
    if arguments.device == "cuda" and not torch.cuda.is_available():
        made.error("no CUDA device was found: use --device cpu")
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    found = report(arguments)
    print(json.dumps(found, indent=1) if arguments.json else tables(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
