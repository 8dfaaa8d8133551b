"""Generate tab: choose subjects and a method, watch the picture and its scores come, keep it."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gradio as gr

from app.orders import orders_for
from app.plan import METHODS, default_prompt
from app.records import Entry
from app.services import Services, owner_of
from app.sessions import Session
from app.ui.errors import guarded
from app.ui.parts import base_choices, block
from app.ui.stage import invitation, results, shot_html, status
from mole_diffusion.errors import MoleError

__all__ = ["GenerateTab", "generate_tab"]

POLL = 0.4
QUIET: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}
POLLING: dict[str, Any] = {**QUIET, "concurrency_limit": None}
STAGE_INTO_VIEW = """() => { if (window.innerWidth <= 860)
  document.querySelector('#status')?.scrollIntoView({block: 'start', behavior: 'smooth'}); }"""


@dataclass(frozen=True)
class Controls:
    """The left column."""

    subjects: gr.CheckboxGroup
    method: gr.Radio
    hint: gr.HTML
    prompt: gr.Textbox
    beside: gr.Checkbox
    go: gr.Button
    stop: gr.Button
    another: gr.Button
    base: gr.Dropdown
    seed: gr.Number
    steps: gr.Slider
    guidance: gr.Slider
    count: gr.Slider
    negative: gr.Textbox
    left_out: gr.CheckboxGroup
    drafted: gr.State
    ready: gr.State
    wanted: gr.State

    @property
    def order(self) -> list[Any]:
        """What decides the picture, in the order that ``_Handlers.start`` takes it."""
        return [
            self.base, self.subjects, self.method, self.prompt, self.beside, self.seed, self.steps, self.guidance,
            self.count, self.negative, self.left_out, self.wanted,
        ]  # fmt: skip

    @property
    def depending(self) -> list[Any]:
        """What follows from the choice of subjects."""
        return [*self.methods, self.prompt, self.drafted, self.left_out, self.wanted]

    @property
    def methods(self) -> list[Any]:
        """What follows from whether gates are trained for them."""
        return [self.method, self.beside, self.hint, self.ready]


@dataclass(frozen=True)
class Stage:
    """The right column."""

    status: gr.HTML
    invite: gr.HTML
    row: gr.Row
    first: gr.HTML
    second: gr.HTML
    results: gr.HTML
    session: gr.State
    seen: gr.State
    timer: gr.Timer


@dataclass(frozen=True)
class GenerateTab:
    """Handles for the page: how another tab hands over a choice of subjects."""

    controls: Controls
    refresh: Any
    offering: list[Any]
    offered: list[Any]
    pick: Any
    picked: list[Any]


def generate_tab(services: Services, page: gr.Blocks) -> GenerateTab:
    """Lay out the tab and bind it."""
    with gr.Row(elem_classes="split"):
        with gr.Column(elem_classes="side"):
            controls = _controls(services)
        with gr.Column(elem_classes="main"):
            stage = _stage()
    handlers = _Handlers(services)
    shown = [controls.subjects, *controls.depending, controls.steps, controls.guidance, stage.invite]
    _bind(page, controls, stage, handlers, shown)
    return GenerateTab(
        controls=controls,
        refresh=handlers.refresh,
        offering=[controls.base, controls.subjects, controls.ready],
        offered=[controls.subjects, *controls.methods],
        pick=handlers.pick,
        picked=[controls.base, *shown],
    )


def _controls(services: Services) -> Controls:
    subjects = gr.CheckboxGroup(label="Subjects", choices=[], elem_classes="pills", elem_id="subjects")
    prompt = gr.Textbox(label="Prompt", lines=3, max_lines=8, elem_id="prompt")
    method = gr.Radio(
        label="Method",
        choices=[(words, key) for key, words in METHODS.items()],
        value="gates",
        elem_classes="pills",
        elem_id="method",
    )
    hint = gr.HTML(visible=False)
    beside = gr.Checkbox(label="NLA beside it, same seed", value=True, elem_id="beside")
    with gr.Row(elem_classes="actions"):
        go = gr.Button("Generate", variant="primary", elem_id="generate", scale=3, min_width=120)
        another = gr.Button("New seed", elem_id="another", scale=1, min_width=104)
        stop = gr.Button("Stop", variant="stop", elem_id="stop", visible=False, scale=1, min_width=104)
    with gr.Accordion("Advanced", open=False, elem_classes="fold"):
        base = gr.Dropdown(
            label="Base",
            choices=base_choices(services.settings),
            value=services.settings.base,
            filterable=False,
            elem_id="base",
        )
        seed = gr.Number(label="Seed", value=0, precision=0, minimum=0, elem_id="seed")
        steps = gr.Slider(label="Steps", minimum=1, maximum=100, step=1, value=25, elem_id="steps")
        guidance = gr.Slider(label="Guidance", minimum=0, maximum=15, step=0.5, value=5.0)
        count = gr.Slider(label="Pictures", minimum=1, maximum=4, step=1, value=1)
        negative = gr.Textbox(label="Negative prompt", max_lines=3)
        left_out = gr.CheckboxGroup(
            label="Leave out",
            info="Switches a subject off; the others share its weight, nothing is retrained.",
            choices=[],
            elem_classes="pills",
        )
    return Controls(
        subjects, method, hint, prompt, beside, go, stop, another, base, seed, steps, guidance, count, negative,
        left_out, gr.State(""), gr.State(False), gr.State(""),
    )  # fmt: skip


def _stage() -> Stage:
    line = gr.HTML(elem_id="status")
    invite = gr.HTML(elem_id="invite")
    with gr.Row(elem_classes="stage solo", visible=False, elem_id="stage") as row:
        first = gr.HTML(elem_id="first")
        second = gr.HTML(visible=False, elem_id="second")
    scores = gr.HTML(elem_id="results")
    return Stage(line, invite, row, first, second, scores, gr.State(""), gr.State(()), gr.Timer(POLL, active=False))


def _bind(page: gr.Blocks, controls: Controls, stage: Stage, handlers: _Handlers, shown: list[Any]) -> None:
    drawn = [
        stage.session, stage.seen, stage.timer, stage.status, stage.invite, stage.row, stage.first, stage.second,
        stage.results, controls.go, controls.another, controls.stop,
    ]  # fmt: skip
    chosen = [controls.subjects, controls.base, controls.prompt, controls.drafted]
    page.load(handlers.open, None, [controls.base, *shown], **QUIET).then(handlers.restore, None, drawn, **QUIET)
    controls.subjects.input(handlers.subjects, chosen, [*controls.depending, stage.invite], **QUIET)
    controls.base.input(handlers.rebase, [controls.base, controls.prompt, controls.drafted], shown, **QUIET)
    controls.method.input(handlers.method, controls.method, controls.beside, **QUIET)
    start = {"fn": handlers.start, "inputs": controls.order, "outputs": drawn, **QUIET}
    controls.go.click(**start).then(None, js=STAGE_INTO_VIEW)
    controls.another.click(handlers.new_seed, None, controls.seed, **QUIET).then(**start).then(None, js=STAGE_INTO_VIEW)
    controls.stop.click(handlers.stop, stage.session, None, **QUIET)
    stage.timer.tick(handlers.tick, [stage.session, stage.seen], drawn, **POLLING)


class _Handlers:
    """What happens on the tab; every method checks whose things it touches."""

    def __init__(self, services: Services) -> None:
        self._services = services

    def _owner(self, request: gr.Request) -> str:
        return owner_of(self._services.settings, request)

    # -- choices -------------------------------------------------------------------------------------------------

    @guarded
    def open(self, request: gr.Request) -> list[Any]:
        """The page opens: preselect a composition that is ready, else the first two subjects."""
        owner = self._owner(request)
        base = self._services.settings.base
        offered = self._services.offered(base, owner)
        known = {entry.sha256 for entry in offered}
        first = next((found for found in self._services.compositions.list(owner) if set(found.experts) <= known), None)
        picked = list(first.experts) if first else [entry.sha256 for entry in offered[:2]]
        return [base, *self._shown(base, picked, "", "", owner)]

    @guarded
    def pick(self, handed: tuple[str, list[str], str], request: gr.Request) -> list[Any]:
        """Another tab hands over a base, subjects and the gates to use until other subjects are chosen."""
        base, experts, wanted = handed
        return [base, *self._shown(base, experts, "", "", self._owner(request), wanted)]

    @guarded
    def rebase(self, base: str, prompt: str, drafted: str, request: gr.Request) -> list[Any]:
        """Another base: its own subjects and defaults."""
        owner = self._owner(request)
        picked = [entry.sha256 for entry in self._services.offered(base, owner)[:2]]
        return self._shown(base, picked, prompt, drafted, owner)

    @guarded
    def refresh(self, base: str, picked: list[str], was_ready: bool, request: gr.Request) -> list[Any]:
        """The tab is opened again: offer what there is now; only what is gone leaves the choice."""
        entries = self._services.offered(base, self._owner(request))
        choices = [(entry.name, entry.sha256) for entry in entries]
        kept = [sha for sha in picked if sha in {entry.sha256 for entry in entries}]
        ready = self._ready(kept, self._owner(request))
        return [
            gr.update(choices=choices) if kept == picked else gr.update(choices=choices, value=kept),
            *([gr.skip()] * 4 if ready == was_ready else self._methods(len(kept), ready)),
        ]

    @guarded
    def subjects(self, picked: list[str], base: str, prompt: str, drafted: str, request: gr.Request) -> list[Any]:
        """Another choice of subjects."""
        owner = self._owner(request)
        entries = self._entries(picked, owner)
        ready = self._ready(picked, owner)
        return [*self._depending(entries, ready, prompt, drafted), invitation(entries, ready)]

    @guarded
    def method(self, method: str) -> Any:
        """NLA is worth a place beside anything but itself."""
        return gr.update(visible=method != "nla", value=method == "gates")

    def _shown(
        self, base: str, picked: Sequence[str], prompt: str, drafted: str, owner: str, wanted: str = ""
    ) -> list[Any]:
        offered = self._services.offered(base, owner)
        entries = [entry for entry in offered if entry.sha256 in picked]
        ready = self._ready(picked, owner)
        steps, guidance = self._defaults(base)
        return [
            gr.update(choices=[(e.name, e.sha256) for e in offered], value=[e.sha256 for e in entries]),
            *self._depending(entries, ready, prompt, drafted, wanted),
            steps,
            guidance,
            invitation(entries, ready),
        ]

    def _depending(self, entries: list[Entry], ready: bool, prompt: str, drafted: str, wanted: str = "") -> list[Any]:
        draft = default_prompt(entries)
        keep = bool(prompt.strip()) and prompt != drafted
        return [
            *self._methods(len(entries), ready),
            gr.skip() if keep else draft,
            gr.skip() if keep else draft,
            gr.update(choices=[e.name for e in entries], value=[], visible=len(entries) > 1),
            wanted,
        ]

    def _methods(self, count: int, ready: bool) -> list[Any]:
        methods = [(words, key) for key, words in METHODS.items() if key != "gates" or ready]
        return [
            gr.update(choices=methods, value="gates" if ready else "spans"),
            gr.update(value=ready, visible=True),
            gr.update(value=_hint(count, ready), visible=not ready and count > 0),
            ready,
        ]

    def _defaults(self, base: str) -> tuple[Any, Any]:
        from mole_diffusion.bases import get_base

        try:
            found = get_base(base)
        except MoleError as error:
            gr.Warning(str(error), title="", duration=10)
            return gr.skip(), gr.skip()
        return found.default_steps, found.default_guidance

    def _entries(self, picked: Sequence[str], owner: str) -> list[Entry]:
        return [entry for entry in self._services.library.entries(owner) if entry.sha256 in picked]

    def _ready(self, picked: Sequence[str], owner: str) -> bool:
        return bool(picked) and self._services.compositions.for_subjects(list(picked), owner) is not None

    # -- pictures ------------------------------------------------------------------------------------------------

    @guarded
    def start(
        self, base: str, picked: list[str], method: str, prompt: str, beside: bool, seed: float | None,
        steps: float | None, guidance: float | None, count: float | None, negative: str, left_out: list[str],
        wanted: str, request: gr.Request,
    ) -> list[Any]:  # fmt: skip
        """Begin; the page follows by the timer."""
        owner = self._owner(request)
        orders = orders_for(
            self._services, owner, base=base, experts=picked, method=method, prompt=prompt, beside=beside,
            seed=seed, steps=steps, guidance=guidance, count=count, negative=negative, left_out=left_out,
            wanted=Path(wanted) if wanted else None,
        )  # fmt: skip
        session = self._services.sessions.start(orders, owner)
        return _drawn(session, ())

    @guarded
    def new_seed(self) -> int:
        """A seed that can be typed again."""
        return random.randrange(1, 100_000)

    @guarded
    def stop(self, session_id: str, request: gr.Request) -> None:
        """Ask the picture to stop after the step it is at."""
        session = self._services.sessions.get(session_id, self._owner(request))
        if session is not None:
            session.cancel.set()

    @guarded
    def tick(self, session_id: str, seen: Sequence[int], request: gr.Request) -> Any:
        """Draw what has changed."""
        session = self._services.sessions.get(session_id, self._owner(request))
        if session is None:
            return [gr.skip(), gr.skip(), gr.Timer(active=False), *[gr.skip()] * 9]
        return _drawn(session, tuple(seen))

    @guarded
    def restore(self, request: gr.Request) -> Any:
        """After a reload: the visitor's last pictures, finished or in the making."""
        session = self._services.sessions.latest(self._owner(request))
        return gr.skip() if session is None else _drawn(session, ())


def _drawn(session: Session, seen: Sequence[int]) -> list[Any]:
    """Updates for what has changed since ``seen``: one number per shot."""
    versions = session.versions
    if tuple(seen) == versions:
        return [gr.skip()] * 12
    over = session.over
    first = _update(session, 0, seen)
    second = _update(session, 1, seen) if len(session.shots) > 1 else gr.update(visible=False)
    columns = len(session.shots)
    return [
        session.id,
        versions,
        gr.Timer(active=not over),
        status(session),
        gr.update(visible=False),
        gr.skip() if seen else gr.update(visible=True, elem_classes=["stage", "solo" if columns == 1 else "pair"]),
        first,
        second,
        results(session) if over else ("" if not seen else gr.skip()),
        gr.update(interactive=over),
        gr.update(visible=over),
        gr.update(visible=not over),
    ]


def _update(session: Session, index: int, seen: Sequence[int]) -> Any:
    if index < len(seen) and seen[index] == session.versions[index]:
        return gr.skip()
    return gr.update(value=shot_html(session.shots[index], session), visible=True)


def _hint(count: int, ready: bool) -> str:
    if ready:
        return ""
    words = (
        "No gates for this set yet: the Train tab makes them."
        if count > 1
        else "One subject alone: choose a second one to compose."
    )
    return block(f'<p class="muted">{words}</p>')
