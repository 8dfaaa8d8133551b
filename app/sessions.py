"""Pictures in the making: a thread writes what happens into a session in memory, the page reads it when it likes."""

from __future__ import annotations

import contextvars
import logging
import queue
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from collections.abc import Generator as Generator_
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from app.generator import Generator, Rendered
from app.gpu import on_gpu
from app.pictures import thumbnail_uri
from app.plan import METHODS, Order, check
from mole_diffusion.errors import Cancelled, MoleError

if TYPE_CHECKING:
    from mole_diffusion.generation import StepEvent

__all__ = ["Picture", "Session", "Sessions", "Shot"]

logger = logging.getLogger(__name__)
KEPT = 32
PREVIEW_SIDE = 512
LOOK = 0.2
"""Seconds without news after which the reader of a picture's events is asked whether to go on."""
SORRY = "Something went wrong that this page did not expect; the log of the server has the details."
State = Literal["waiting", "running", "done", "failed", "cancelled"]


@dataclass(frozen=True)
class Picture:
    """A finished picture: PNG bytes that carry their parameters, and where they are kept."""

    png: bytes
    path: Path


@dataclass
class Shot:
    """One method's pictures of a session, filled while they are made."""

    order: Order
    state: State = "waiting"
    step: int = 0
    steps: int = 0
    note: str = ""
    preview: str = ""
    alignment: list[dict[str, float]] = field(default_factory=list)
    pictures: list[Picture] = field(default_factory=list)
    rendered: Rendered | None = None
    error: str = ""
    started: float = 0.0
    seconds: float = 0.0
    version: int = 0

    @property
    def title(self) -> str:
        """The method in words."""
        return METHODS[self.order.method]

    @property
    def over(self) -> bool:
        """Whether nothing more will happen."""
        return self.state in ("done", "failed", "cancelled")


@dataclass
class Session:
    """Orders made one after the other, with the same seed, for one visitor."""

    id: str
    owner: str
    shots: list[Shot]
    cancel: threading.Event = field(default_factory=threading.Event)

    @property
    def over(self) -> bool:
        """Whether every shot has ended."""
        return all(shot.over for shot in self.shots)

    @property
    def active(self) -> Shot | None:
        """The shot that is being made or waits first."""
        return next((shot for shot in self.shots if not shot.over), None)

    @property
    def versions(self) -> tuple[int, ...]:
        """One number per shot that grows with every change."""
        return tuple(shot.version for shot in self.shots)


class Sessions:
    """Starts sessions and finds them again, also after the page was reloaded.

    Args:
        generator: makes the pictures, one at a time.
        images: folder that finished pictures are written to.
    """

    def __init__(self, generator: Generator, images: Path) -> None:
        self._render = renderer(generator)
        self._images = images
        self._sessions: dict[str, Session] = {}
        self._lock = threading.Lock()

    def start(self, orders: list[Order], owner: str = "") -> Session:
        """Check the orders and begin in the background. Raises InvalidRequest before anything runs."""
        session = Session(uuid.uuid4().hex, owner, [Shot(check(order), steps=order.steps) for order in orders])
        with self._lock:
            self._sessions[session.id] = session
            for old in list(self._sessions)[:-KEPT]:
                if self._sessions[old].over:
                    del self._sessions[old]
        context = contextvars.copy_context()
        threading.Thread(target=context.run, args=(self._run, session), name="mole-picture", daemon=True).start()
        return session

    def get(self, session_id: str | None, owner: str = "") -> Session | None:
        """A visitor's session by its id, or None."""
        session = self._sessions.get(session_id or "")
        return session if session is not None and session.owner == owner else None

    def latest(self, owner: str = "") -> Session | None:
        """The visitor's newest session, or None."""
        return next((s for s in reversed(list(self._sessions.values())) if s.owner == owner), None)

    def wait(self, session: Session, seconds: float = 3600.0) -> Session:
        """Block until the session is over."""
        deadline = time.monotonic() + seconds
        while not session.over and time.monotonic() < deadline:
            time.sleep(0.05)
        return session

    # -- the thread --------------------------------------------------------------------------------------------

    def _run(self, session: Session) -> None:
        for shot in session.shots:
            if session.cancel.is_set():
                _end(shot, "cancelled")
                continue
            try:
                self._make(session, shot)
            except Cancelled:
                _end(shot, "cancelled")
            except MoleError as error:
                _end(shot, "failed", str(error))
            except Exception:
                logger.exception("A picture failed.")
                _end(shot, "failed", SORRY)

    def _make(self, session: Session, shot: Shot) -> None:
        with closing(self._render(shot.order)) as updates:
            for update in updates:
                if session.cancel.is_set():
                    raise Cancelled("Stopped.")
                if isinstance(update, MoleError):
                    raise update
                if isinstance(update, Rendered):
                    self._finish(shot, update)
                elif update is not None:
                    _note(shot, update)

    def _finish(self, shot: Shot, rendered: Rendered) -> None:
        shot.rendered = rendered
        shot.pictures = [self._keep(image, rendered, index) for index, image in enumerate(rendered.images)]
        shot.seconds = time.monotonic() - shot.started
        _end(shot, "done")

    def _keep(self, image: Any, rendered: Rendered, index: int) -> Picture:
        from mole_diffusion.png import save_png

        self._images.mkdir(parents=True, exist_ok=True)
        path = self._images / f"{time.strftime('%Y%m%d-%H%M%S')}-{uuid.uuid4().hex[:12]}-{index}.png"
        save_png(image, path, rendered.parameters[index])
        return Picture(path.read_bytes(), path)


def _end(shot: Shot, state: State, error: str = "") -> None:
    shot.state, shot.error = state, error
    shot.version += 1


def _note(shot: Shot, event: StepEvent | str) -> None:
    shot.version += 1
    if isinstance(event, str):
        shot.note = event
        return
    if shot.state == "waiting":
        shot.state, shot.started, shot.note = "running", time.monotonic(), ""
    shot.step, shot.steps = event.step, event.steps
    shot.alignment.append(dict(event.alignment))
    if event.preview is not None:
        shot.preview = thumbnail_uri(event.preview, PREVIEW_SIDE)


def _seconds(order: Order) -> int:
    return min(60 + order.steps * order.count, 300)


def renderer(generator: Generator) -> Callable[[Order], Generator_[Any, None, None]]:
    """A function that yields notes, steps and the result of an order, and None where nothing is new; closing cancels.

    A generator function of plain data, because ZeroGPU runs it in a process of its own, pickles the order on the
    way there and what is yielded on the way back. It keeps the sentence of an error to itself there, so a MoleError
    is yielded too.
    """

    @on_gpu(_seconds)
    def render(order: Order) -> Generator_[Any, None, None]:
        try:
            yield from _render(generator, order)
        except MoleError as error:
            yield error

    return render


def _render(generator: Generator, order: Order) -> Iterator[str | StepEvent | Rendered | None]:
    updates: queue.SimpleQueue[Any] = queue.SimpleQueue()
    cancel = threading.Event()

    def work() -> None:
        try:
            updates.put(generator.render(order, updates.put, cancel, updates.put))
        except BaseException as error:  # noqa: BLE001 - handed over to the reader of the queue
            updates.put(error)

    worker = threading.Thread(target=work, name="mole-render", daemon=True)
    worker.start()
    try:
        yield from _until_done(updates)
    finally:
        cancel.set()
        worker.join()


def _until_done(updates: queue.SimpleQueue[Any]) -> Iterator[Any]:
    while True:
        try:
            update = updates.get(timeout=LOOK)
        except queue.Empty:
            yield None
            continue
        if isinstance(update, BaseException):
            raise update
        yield update
        if isinstance(update, Rendered):
            return
