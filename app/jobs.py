"""Training in the background, as the page sees it: what can be started, what runs, what came of it."""

from __future__ import annotations

import itertools
import statistics
import threading
from collections import OrderedDict, deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from app.library import Library
from app.records import Entry
from mole_diffusion.errors import InvalidRequest
from training.jobs.limits import NO_LIMITS, Limits
from training.jobs.retention import remove_folder
from training.jobs.states import WAITING

if TYPE_CHECKING:
    from training.jobs.store import Job, JobEvent, JobStore
    from training.jobs.worker import Worker

__all__ = ["GateRecipe", "JobSample", "JobService", "JobView"]

KEPT_CURVES = 16
USUAL = {"demo": (40.0, 0.6)}
"""Seconds before the first step and for each step on a laptop's CPU, until a first job has measured this machine."""


@dataclass(frozen=True)
class GateRecipe:
    """How gates are trained; the defaults suit the demo and are a start elsewhere.

    Attributes:
        scope: "token" gives each place of the picture its own weights, "sample" the whole picture one.
        steps: optimisation steps.
        lr: learning rate of the gates; None = what suits the base.
        alpha: weight of the balance loss (MoLE, arXiv 2404.13628, Eq. 16).
    """

    scope: str = "token"
    steps: int = 300
    lr: float | None = None
    alpha: float = 0.5
    seed: int = 0

    def __post_init__(self) -> None:
        if self.scope not in ("token", "sample"):
            raise InvalidRequest(f"The scope is “token” or “sample”, but it was {self.scope!r}.")
        if not 1 <= self.steps <= 100_000:
            raise InvalidRequest(f"Between 1 and 100,000 steps are possible; {self.steps} were asked for.")
        if self.lr is not None and not 0 < self.lr <= 1:
            raise InvalidRequest(f"The learning rate lies above 0 and at most at 1; it was {self.lr:g}.")
        if not 0 <= self.alpha <= 100:
            raise InvalidRequest(f"The balance weight lies between 0 and 100; it was {self.alpha:g}.")


@dataclass(frozen=True)
class JobSample:
    """A picture made along the way: alignment by text, identity by subject, and which models say so."""

    step: int
    path: Path
    scores: dict[str, float]
    identity: dict[str, float]
    scorers: tuple[str, ...]


@dataclass(frozen=True)
class JobView:
    """One job with what the page draws: losses by step, on held-out scenes too, scores, sample pictures, its log."""

    job: Job
    losses: list[tuple[int, float]]
    held_out: list[tuple[int, float]]
    scores: list[tuple[int, float]]
    samples: list[JobSample]
    log: str
    seconds_left: float | None


@dataclass
class Curve:
    """What the page draws of a job's progress, up to the event with number ``last``; later ones are appended."""

    last: int = 0
    losses: list[tuple[int, float]] = field(default_factory=list)
    held_out: list[tuple[int, float]] = field(default_factory=list)
    scores: list[tuple[int, float]] = field(default_factory=list)
    times: deque[float] = field(default_factory=lambda: deque(maxlen=20))

    def extend(self, progress: Sequence[JobEvent]) -> None:
        """Append what is new."""
        self.losses += _metric(progress, "loss")
        self.held_out += _metric(progress, "held_out_loss")
        self.scores += _metric(progress, "score")
        self.times.extend(event.time for event in progress)
        self.last = progress[-1].number if progress else self.last

    def seconds_left(self, job: Job) -> float | None:
        """From the pace of the last steps, so that the preparation does not count."""
        if job.state != "running" or len(self.times) < 3:
            return None
        steps = (after - before for before, after in itertools.pairwise(self.times))  # a pause may lie between two
        return statistics.median(steps) * (job.total - job.step)


class JobService:
    """Queues gate training and reads its state from the database, so that nothing is lost with the page.

    Args:
        store: the job table.
        worker: starts one child process per job.
        library: where the experts of a job come from.
        blocked: why nothing can be trained here, or None.
        limits: what one visitor may ask for.
    """

    def __init__(
        self,
        store: JobStore,
        worker: Worker,
        library: Library,
        data_dir: Path,
        blocked: str | None = None,
        limits: Limits = NO_LIMITS,
    ) -> None:
        self._store = store
        self._worker = worker
        self._library = library
        self._data_dir = data_dir
        self._curves: OrderedDict[str, Curve] = OrderedDict()
        self._reading = threading.Lock()
        self.blocked = blocked
        self.limits = limits

    def start_worker(self) -> None:
        """Begin to serve the queue in this process; jobs of an earlier run go on."""
        if self.blocked is None:
            self._worker.start()

    def stop_worker(self) -> None:
        """Stop serving; a running job goes on and is adopted by the next worker."""
        self._worker.stop()

    def train_gates(self, base: str, experts: Sequence[str], recipe: GateRecipe, owner: str = "") -> str:
        """Queue gates for these experts and return the job's id. Raises InvalidRequest with a sentence."""
        if self.blocked:
            raise InvalidRequest(self.blocked)
        entries = [self._library.get(sha256, owner) for sha256 in experts]
        self._check(entries)
        for entry in entries:
            self._library.materialise(entry)
        config = {
            "base": base,
            "experts": [self._expert(entry) for entry in entries],
            "objective": "collage",
            "scope": recipe.scope,
            "steps": recipe.steps,
            "lr": recipe.lr,
            "alpha": recipe.alpha,
            "seed": recipe.seed,
        }
        return self._create("gate", config, " + ".join(entry.name for entry in entries), owner)

    def train_subject(
        self, settings: Mapping[str, Any], images: Path, preset: str | None = None, owner: str = "",
        job_id: str | None = None,
    ) -> str:  # fmt: skip
        """Queue an expert of the pictures in ``images`` and return the job's id. Raises InvalidRequest with a sentence.

        Args:
            settings: those of SubjectConfig by their names in JSON: base, token, class, adapter, steps, rank and more.
            images: a folder inside the data folder (or the assets) with this visitor's pictures; visitors name none.
            job_id: names the job, where its folder was made before.
            preset: sets defaults for a GPU of some size; what ``settings`` say wins.
        """
        from training.jobs.kinds import inside
        from training.presets import preset as find_preset
        from training.tasks.subject_config import SubjectConfig

        if self.blocked:
            raise InvalidRequest(self.blocked)
        folder = inside(str(images), self._data_dir)
        config = SubjectConfig.of(preset, **settings)
        usual = find_preset(preset).settings("subject") if preset is not None else {}
        root = self._data_dir.resolve()
        named = folder.relative_to(root) if folder.is_relative_to(root) else folder
        given = {**usual, **settings, "images": named.as_posix()}
        return self._create("subject", given, config.name or config.phrase, owner, job_id)

    def list(self, owner: str = "", limit: int = 20) -> list[Job]:
        """The owner's newest jobs, newest first, and all that have not ended."""
        newest = self._store.list(owner=owner, limit=limit)
        known = {job.id for job in newest}
        return newest + [job for job in self._store.list(WAITING, owner=owner, limit=None) if job.id not in known]

    def view(self, job_id: str, owner: str = "") -> JobView:
        """One job in full. Raises InvalidRequest for a job of somebody else."""
        job = self._own(job_id, owner)
        with self._reading:  # several pages may look at once
            curve = self._curve(job.id)
            losses, held_out, scores = list(curve.losses), list(curve.held_out), list(curve.scores)
            seconds_left = curve.seconds_left(job)
        return JobView(
            job=job,
            losses=losses,
            held_out=held_out,
            scores=scores,
            samples=self._samples(job),
            log=_tail(self._folder(job) / "log.txt"),
            seconds_left=seconds_left,
        )

    def made(self, job_id: str, owner: str = "") -> tuple[Job, Path | None]:
        """A job and its composition file, None as long as there is none. Raises InvalidRequest like :meth:`view`."""
        job = self._own(job_id, owner)
        return job, self._composition(job)

    def cancel(self, job_id: str, owner: str = "") -> None:
        """Ask a job to stop; what it has trained so far stays in its checkpoint."""
        self._store.request_cancel(self._own(job_id, owner).id)

    def pause(self, job_id: str, owner: str = "") -> None:
        """Ask a running job to write a checkpoint and free the device until it is resumed."""
        self._store.request_pause(self._own(job_id, owner).id)

    def resume(self, job_id: str, owner: str = "") -> None:
        """Go on with a paused or cancelled job from its checkpoint."""
        self._store.resume(self._own(job_id, owner).id, limits=self.limits)

    def retry(self, job_id: str, owner: str = "") -> None:
        """Go on with a failed job from its last checkpoint."""
        self._store.retry(self._own(job_id, owner).id, limits=self.limits)

    def remove(self, job_id: str, owner: str = "") -> None:
        """Forget an ended job with its pictures, checkpoints and gates; an expert in the library stays.

        Raises InvalidRequest for one that has not ended.
        """
        job = self._own(job_id, owner)
        gates = self._composition(job)
        self._store.delete(job.id)
        remove_folder(self._data_dir, job.id)
        if gates is not None:
            gates.unlink(missing_ok=True)

    def save_now(self, job_id: str, owner: str = "") -> None:
        """Ask a running job for a checkpoint."""
        self._store.request_save(self._own(job_id, owner).id)

    def sample_now(self, job_id: str, owner: str = "") -> None:
        """Ask a running job for sample pictures."""
        self._store.request_sample(self._own(job_id, owner).id)

    def compositions(self, owner: str = "") -> list[Path]:
        """Composition files of the owner's finished jobs, newest first."""
        finished = self._store.list(["finished"], owner=owner, kind="gate")
        return [path for job in finished if (path := self._composition(job)) is not None]

    def estimate(self, base: str, steps: int) -> str:
        """How long training will take, in words, from what earlier jobs on this base took."""
        finished = self._store.list(["finished"], kind="gate", limit=50)
        measured = list(itertools.islice((pace for job in finished if (pace := self._pace(job, base))), 5))
        if measured:
            start, step = (statistics.median(values) for values in zip(*measured, strict=True))
        elif base in USUAL:
            start, step = USUAL[base]
        else:
            return f"{steps:,} steps. The first job on a base shows how long a step takes here."
        basis = "as measured on this machine" if measured else "on a laptop without a GPU"
        return f"{steps:,} steps, about {duration(start + step * steps)} {basis}."

    # -- inside ------------------------------------------------------------------------------------------------

    def _create(
        self, kind: str, config: Mapping[str, Any], title: str, owner: str, job_id: str | None = None
    ) -> str:
        return self._store.create(
            kind, config, title=title, owner=owner or None, limits=self.limits, job_id=job_id
        )  # fmt: skip

    def _check(self, entries: Sequence[Entry]) -> None:
        if len(entries) < 2:
            raise InvalidRequest(f"Gates mix at least two subjects; {len(entries)} chosen. Choose one more.")
        families = {entry.family for entry in entries}
        if len(families) > 1:
            raise InvalidRequest(f"These subjects were made for different bases ({', '.join(sorted(families))}).")
        names = [entry.name for entry in entries]
        if len(set(names)) < len(names):
            raise InvalidRequest("Two of these subjects have the same name; rename one of them in the library.")
        for entry in entries:
            if not entry.trigger and not entry.subject_class:
                raise InvalidRequest(f"“{entry.name}” has neither a trigger nor a class; enter one in the library.")
        self._check_phrases(entries)

    def _check_phrases(self, entries: Sequence[Entry]) -> None:
        """A prompt calls each subject by words of its own; the trainer refuses twins, but only once it runs."""
        from training.data.subjects import subject_phrase

        known: dict[str, str] = {}
        for entry in entries:
            phrase = subject_phrase(entry.trigger, entry.subject_class)
            if (other := known.setdefault(phrase.lower(), entry.name)) != entry.name:
                raise InvalidRequest(
                    f"“{other}” and “{entry.name}” are both called “{phrase}” in prompts; "
                    "give one of them another trigger in the library."
                )

    def _expert(self, entry: Entry) -> dict[str, Any]:
        folder = self._library.training_views(entry)
        return {
            "sha256": entry.sha256,
            "name": entry.name,
            "trigger": entry.trigger or None,
            "class": entry.subject_class or None,
            "views": str(folder.resolve()) if folder else None,
        }

    def _own(self, job_id: str, owner: str) -> Job:
        job = self._store.get(job_id)
        if (job.owner or "") != owner:
            raise InvalidRequest("There is no such job.")
        return job

    def _curve(self, job_id: str) -> Curve:
        """The job's curve with what has come since the last look; the curves looked at last are kept."""
        curve = self._curves.setdefault(job_id, Curve())
        self._curves.move_to_end(job_id)
        while len(self._curves) > KEPT_CURVES:
            self._curves.popitem(last=False)
        curve.extend(self._store.events(job_id, after=curve.last, types=["progress"], limit=100_000))
        return curve

    def _folder(self, job: Job) -> Path:
        return self._data_dir / "jobs" / job.id

    def _samples(self, job: Job) -> list[JobSample]:
        found = []
        for event in self._store.events(job.id, types=["sample"]):
            path = self._inside(job, str(event.data.get("path", "")))
            if path is not None:
                scores, identity = (dict(event.data.get(name) or {}) for name in ("scores", "identity"))
                scorers = tuple(event.data.get("scorers") or ())
                found.append(JobSample(event.step or 0, path, scores, identity, scorers))
        return found

    def _inside(self, job: Job, name: str) -> Path | None:
        path = (self._folder(job) / name).resolve()
        return path if path.is_file() and path.is_relative_to(self._folder(job).resolve()) else None

    def _pace(self, job: Job, base: str) -> tuple[float, float] | None:
        """Seconds before the first step and for each step of a finished job on this base."""
        if job.config.get("base") != base or not job.started or not job.ended:
            return None
        if job.starts != 1:  # it was paused or interrupted: its times say nothing
            return None
        first = next(iter(self._store.events(job.id, types=["progress"], limit=1)), None)
        if first is None or (steps := job.step - (first.step or 0)) < 9:
            return None
        return first.time - job.started, (job.ended - first.time) / steps

    def _composition(self, job: Job) -> Path | None:
        named = (job.result or {}).get("path")
        path = (self._data_dir / str(named)) if named else None
        return path if path is not None and path.is_file() else None


def _metric(progress: Sequence[JobEvent], name: str) -> list[tuple[int, float]]:
    return [(event.step or 0, float(event.data[name])) for event in progress if name in event.data]


def _tail(log: Path, lines: int = 40) -> str:
    if not log.is_file():
        return ""
    with log.open("rb") as file:
        file.seek(max(log.stat().st_size - 16_384, 0))
        return "\n".join(file.read().decode("utf-8", "replace").splitlines()[-lines:])


def duration(seconds: float) -> str:
    """Seconds in calm words."""
    if seconds < 50:
        return f"{max(round(seconds / 5) * 5, 5)} seconds"
    if seconds < 90:
        return "a minute"
    if seconds < 5400:
        return f"{round(seconds / 60)} minutes"
    return f"{seconds / 3600:.1f} hours"
