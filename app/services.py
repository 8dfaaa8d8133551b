"""The composition root of the services: what the page's tabs are functions of."""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING

from app.compositions import Compositions
from app.generator import Generator
from app.jobs import JobService
from app.library import Library
from app.records import Entry, open_database
from app.scorer import Scorer
from app.sessions import Sessions
from app.settings import Settings
from app.shipped import Shipped
from app.subjects import SubjectService
from app.visits import visitor
from mole_diffusion.errors import MoleError

if TYPE_CHECKING:
    import gradio as gr

__all__ = ["Services", "build_services", "owner_of"]


@dataclass(frozen=True)
class Services:
    """Everything a tab may use."""

    settings: Settings
    library: Library
    compositions: Compositions
    jobs: JobService
    subjects: SubjectService
    generator: Generator
    sessions: Sessions

    def start(self) -> None:
        """Begin background work once the server answers: the training queue and the warm-up of the first base.

        ZeroGPU forks this process for every picture: a lock that a thread holds at that moment stays locked there.
        """
        self.jobs.start_worker()
        if self.settings.warm_up and not self.settings.zero_gpu:
            threading.Thread(target=self._warm_up, name="mole-warm-up", daemon=True).start()

    def _warm_up(self) -> None:
        self.library.entries()
        self.generator.warm_up(self.settings.base)

    def offered(self, base: str, owner: str) -> list[Entry]:
        """The experts of the library that fit a base."""
        from mole_diffusion.bases import get_base

        try:
            family = get_base(base).family
        except MoleError:  # its files are missing: said when somebody asks it for a picture
            return []
        return [entry for entry in self.library.entries(owner) if entry.family == family]

    def stop(self) -> None:
        """Stop serving the queue; a job that runs goes on."""
        self.jobs.stop_worker()


def build_services(settings: Settings, scorer: Scorer | None = None) -> Services:
    """Wire the services to one data folder. Creates the folder; loads no model."""
    from mole_diffusion.bases import assets_dir
    from training.jobs.executor import LocalExecutor
    from training.jobs.store import JobStore, database_url
    from training.jobs.worker import Worker

    data_dir = settings.data_dir
    for name in ("experts", "subjects", "compositions", "jobs", "images"):
        (data_dir / name).mkdir(parents=True, exist_ok=True)
    url = database_url(data_dir)
    shipped = Shipped(assets_dir() / "demo")
    library = Library(open_database(url), data_dir, shipped, settings.base_names)
    store = JobStore.of(data_dir, settings.database)
    executor = LocalExecutor(device=settings.device, database=settings.database, limits=settings.limits)
    worker = Worker(store, data_dir, executor=executor, device=settings.device, retention=settings.retention)
    jobs = JobService(store, worker, library, data_dir, settings.training_blocked, settings.limits)
    generator = Generator(settings.device, scorer or Scorer())
    return Services(
        settings=settings,
        library=library,
        compositions=Compositions(shipped, jobs.compositions),
        jobs=jobs,
        subjects=SubjectService(jobs, store, library, data_dir, settings.base_names),
        generator=generator,
        sessions=Sessions(generator, data_dir / "images"),
    )


def owner_of(settings: Settings, request: gr.Request | None) -> str:
    """Whose things a visitor may see: "" where the page has one user, else this user's or this browser's alone."""
    return visitor(request) if settings.space else ""
