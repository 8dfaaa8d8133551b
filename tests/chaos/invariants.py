"""What must hold after every fault, each as a function that gives the violations as sentences."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image
from safetensors import SafetensorError, deserialize

from training.jobs.store import JobEvent

RESUMED = "Resumed after step "
DAMAGED = "damaged-"  # what the trainer set aside is no longer under a real name


@dataclass
class Attempt:
    """One process's work on a job: the step that it went on from, and the steps that it reported."""

    said: int | None = None
    steps: list[int] = field(default_factory=list)
    saved: list[int] = field(default_factory=list)

    @property
    def resumed(self) -> int | None:
        """Finished steps when it began; None if it died before anybody could know."""
        return self.said if self.said is not None else self.steps[0] - 1 if self.steps else None


def attempts(events: Sequence[JobEvent]) -> list[Attempt]:
    """A job's events (all types, in order) by process."""
    found: list[Attempt] = []
    for event in events:
        if event.type == "state" and event.data.get("state") == "running":
            found.append(Attempt())
        elif not found:
            continue
        elif event.type == "progress" and event.step is not None:
            found[-1].steps.append(event.step)
        elif event.type == "saved" and event.step is not None:
            found[-1].saved.append(event.step)
        elif event.type == "log" and str(event.data.get("text", "")).startswith(RESUMED):
            found[-1].said = int(str(event.data["text"]).removeprefix(RESUMED).rstrip("."))
    return found


def losses(tries: Sequence[Attempt]) -> list[int]:
    """Steps that were reported and had to be done again, once for each process that went on after another."""
    lost, reported = [], None
    for attempt in tries:
        if attempt.resumed is None:
            continue
        if reported is not None:
            lost.append(max(reported - attempt.resumed, 0))
        reported = attempt.steps[-1] if attempt.steps else attempt.resumed
    return lost


def lost_work(tries: Sequence[Attempt], interval: int) -> list[str]:
    """Interruptions that cost more than ``interval`` steps."""
    return [f"{steps} steps lost, {interval} allowed" for steps in losses(tries) if steps > interval]


def disorder(tries: Sequence[Attempt]) -> list[str]:
    """Steps that do not grow within one process's work: two trained at once, or one does not know where it is.

    Steps may be missing: they are not reported while the database is away.
    """
    wrong = []
    for number, attempt in enumerate(tries, 1):
        before = attempt.said or 0
        for step in attempt.steps:
            if step <= before:
                wrong.append(f"start {number} reported step {step} after step {before}")
            before = step
    return wrong


def half_files(folder: Path) -> Iterator[str]:
    """Files under a real name that are not whole."""
    for path in sorted(folder.rglob("*")):
        inside = path.relative_to(folder).parts
        if any(part.startswith((".", DAMAGED)) for part in inside) or not path.is_file():
            continue
        try:
            _read(path)
        except (OSError, ValueError, SyntaxError, SafetensorError) as error:
            yield f"{path.relative_to(folder)} is not whole ({error})"


def _read(path: Path) -> None:
    if path.suffix == ".safetensors":
        deserialize(path.read_bytes())
    elif path.suffix == ".json":
        json.loads(path.read_text())
    elif path.suffix == ".png":
        with Image.open(path) as picture:
            picture.load()


def content(path: Path) -> str:
    """SHA-256 of what a file holds, to the bit. Safetensors' header names metadata in an order that is random."""
    data = path.read_bytes()
    if path.suffix != ".safetensors":
        return hashlib.sha256(data).hexdigest()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    return hashlib.sha256(json.dumps(header, sort_keys=True).encode() + data[8 + length :]).hexdigest()


def leftovers(folder: Path) -> tuple[list[str], list[str]]:
    """Temporary folders and temporary files that killed processes left behind, as paths below ``folder``."""
    hidden = [path for path in sorted(folder.rglob(".*")) if not path.name.startswith(".nfs")]
    names = [(path.is_dir(), str(path.relative_to(folder))) for path in hidden]
    return [name for is_folder, name in names if is_folder], [name for is_folder, name in names if not is_folder]
