"""New subjects: pictures of one become an expert in the background, and the finished expert joins the library."""

from __future__ import annotations

import logging
import shutil
import threading
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from app.jobs import JobService
from app.library import MAX_VIEWS, Library
from mole_diffusion.errors import InvalidRequest, MoleError
from training.jobs.records import job_folder

if TYPE_CHECKING:
    from training.jobs.store import Job, JobStore

__all__ = ["SubjectRecipe", "SubjectService"]

logger = logging.getLogger(__name__)
MAX_PICTURES = 40
ADAPTERS = ("lora", "moslora")


@dataclass(frozen=True)
class SubjectRecipe:
    """What a visitor says of a new subject.

    Attributes:
        token: the new word that will call it.
        class_name: what it is, in a plain word.
        adapter: "lora", or "moslora" with its orthogonal mixer.
        preset: defaults for a GPU of some size; None = the base's own.
        steps: None = what the preset or the base says; so is ``rank``.
    """

    base: str
    token: str
    class_name: str
    adapter: str = "lora"
    preset: str | None = None
    steps: int | None = None
    rank: int | None = None
    seed: int = 0

    def settings(self) -> dict[str, Any]:
        """What was said, by the names of a subject job's configuration. Raises InvalidRequest."""
        if not self.class_name.strip():
            raise InvalidRequest("Say what the subject is in a plain word: dog, robot, vase.")
        if self.adapter not in ADAPTERS:
            raise InvalidRequest(f"The adapter is one of {', '.join(ADAPTERS)}, but it was {self.adapter!r}.")
        given = {"steps": self.steps, "rank": self.rank}
        said = {"base": self.base, "token": self.token.strip(), "class": self.class_name.strip()}
        chosen = {key: value for key, value in given.items() if value is not None}
        return {**said, "adapter": self.adapter, "seed": self.seed, **chosen}


class SubjectService:
    """Takes pictures in, queues their training, and puts what comes of it into the library.

    Args:
        jobs: queues and knows whose jobs are whose.
        store: where it is written down that an expert has joined the library: one that is removed stays removed.
        bases: names of the bases that may be trained on.
    """

    def __init__(
        self, jobs: JobService, store: JobStore, library: Library, data_dir: Path, bases: Sequence[str]
    ) -> None:
        self._jobs, self._store, self._library = jobs, store, library
        self._data_dir, self._bases, self._adding = data_dir, tuple(bases), threading.Lock()
        self._known: set[str] = set()

    def train(self, pictures: Sequence[Path], recipe: SubjectRecipe, owner: str = "") -> tuple[str, tuple[str, ...]]:
        """Queue a subject's training: the job's id, and what to know about the pictures.

        Raises InvalidRequest for no pictures, too many or unreadable ones, and settings out of range: nothing is kept.
        """
        from training.data.pictures import check_pictures

        if self._jobs.blocked:
            raise InvalidRequest(self._jobs.blocked)
        if recipe.base not in self._bases:
            raise InvalidRequest(f"The base is one of {', '.join(self._bases)}, but it was {recipe.base!r}.")
        if not 1 <= len(pictures) <= MAX_PICTURES:
            raise InvalidRequest(f"A subject needs between 1 and {MAX_PICTURES} pictures; {len(pictures)} came.")
        settings = recipe.settings()
        job = uuid.uuid4().hex
        folder = job_folder(self._data_dir, job) / "pictures"  # they live and are counted with their job
        try:
            self._take(pictures, folder)
            warnings = check_pictures(folder).warnings
            return self._jobs.train_subject(settings, folder, recipe.preset, owner, job), warnings
        except BaseException:
            shutil.rmtree(folder.parent, ignore_errors=True)
            raise

    def collect(self, owner: str = "") -> list[str]:
        """Put the owner's newly finished experts into the library, with their first pictures; their names."""
        added = []
        for job in self._store.list(["finished"], owner=owner, kind="subject", limit=None):
            if not self.collected(job):
                added += self._add(job, owner)
        return added

    def collected(self, job: Job) -> bool:
        """Whether what a job trained has been offered to the library."""
        if job.id not in self._known and self._store.events(job.id, types=["collected"], limit=1):
            self._known.add(job.id)
        return job.id in self._known

    def _add(self, job: Job, owner: str) -> list[str]:
        path = self._data_dir / str((job.result or {}).get("path", ""))
        if not path.is_file():
            return []
        with self._adding:
            if self.collected(job):  # another page was faster
                return []
            try:
                entry = self._library.add(path, f"{job.title}.safetensors", owner).entry
                shown = sorted((self._data_dir / str(job.config["images"])).glob("*.png"))[:MAX_VIEWS]
                if shown and not entry.builtin and not entry.views:
                    self._library.set_views(entry.sha256, owner, pictures=shown)
            except MoleError as error:
                logger.exception("A trained expert could not join the library.")
                self._store.record(job.id, "log", {"text": f"It could not join the library: {error}"})
                self._store.record(job.id, "collected", {"refused": str(error)})
                return []
            self._store.record(job.id, "collected", {})
        return [entry.name]

    def _take(self, pictures: Sequence[Path], folder: Path) -> None:
        """Copies without metadata, as PNG; each is measured before it is decoded."""
        from training.data.pictures import read_picture

        folder.mkdir(parents=True)
        for number, path in enumerate(pictures):
            read_picture(path).save(folder / f"{number:03d}.png")
