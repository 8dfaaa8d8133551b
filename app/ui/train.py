"""Train tab: choose experts, start, and watch; what is shown comes from the database, so a reload loses nothing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

import gradio as gr

from app.jobs import GateRecipe
from app.services import Services, owner_of
from app.ui.errors import guarded
from app.ui.job_views import curve, head, job_list, log_html, samples
from app.ui.parts import CLICKS, base_choices, block, empty, note, notes
from app.ui.train_subject import subject_form
from training.jobs.states import TERMINAL

__all__ = ["TrainTab", "train_tab"]

POLL = 1.0
QUIET: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}
POLLING: dict[str, Any] = {**QUIET, "concurrency_limit": None}
SURE = "(job) => confirm('Remove this job with its pictures and gates? A subject in the library stays.') ? job : ''"
KINDS = [("Gates for subjects", "gates"), ("A new subject", "subject")]
SCOPES = [("Each place of the picture", "token"), ("The whole picture", "sample")]


@dataclass(frozen=True)
class Controls:
    """The left column."""

    subjects: gr.CheckboxGroup
    estimate: gr.HTML
    go: gr.Button
    base: gr.Dropdown
    scope: gr.Radio
    steps: gr.Slider
    lr: gr.Number
    alpha: gr.Number
    seed: gr.Number

    @property
    def recipe(self) -> list[Any]:
        """What a job is started with, in the order that ``_Handlers.start`` takes it."""
        return [self.base, self.subjects, self.scope, self.steps, self.lr, self.alpha, self.seed]


@dataclass(frozen=True)
class Detail:
    """The chosen job."""

    head: gr.HTML
    curve: gr.HTML
    samples: gr.HTML
    log_box: gr.Accordion
    log: gr.HTML
    use: gr.Button
    resume: gr.Button
    pause: gr.Button
    sample: gr.Button
    cancel: gr.Button
    remove: gr.Button

    @property
    def all(self) -> list[Any]:
        """Every part, in the order in which ``_Handlers.poll`` gives them."""
        buttons = [self.use, self.resume, self.pause, self.sample, self.cancel, self.remove]
        return [self.head, self.curve, self.samples, self.log_box, self.log, *buttons]


@dataclass(frozen=True)
class TrainTab:
    """Handles for the page.

    Attributes:
        use: the button that takes a finished composition to the generate tab.
        chosen: id of the chosen job.
        refresh: handler that offers what the library holds now.
        picked: handler that turns the chosen job's id into (base, hashes of its experts, file of its gates).
    """

    use: gr.Button
    chosen: gr.State
    refresh: Any
    offering: list[Any]
    offered: gr.CheckboxGroup
    picked: Any


def train_tab(services: Services, page: gr.Blocks) -> TrainTab:
    """Lay out the tab and bind it."""
    chosen, seen, touched, timer = gr.State(""), gr.State({}), gr.State(False), gr.Timer(POLL)
    with gr.Row(elem_classes="split"):
        with gr.Column(elem_classes="side"):
            kind = gr.Radio(
                label="What to train", choices=KINDS, value="gates", elem_classes="pills", elem_id="train-kind"
            )
            with gr.Column(elem_id="gates-form") as gates_box:
                controls = _controls(services)
            with gr.Column(visible=False, elem_id="subject-form") as subject_box:
                form = subject_form(services)
        with gr.Column(elem_classes="main"):
            jobs = gr.HTML(elem_id="jobs", js_on_load=CLICKS)
            detail = _detail()
    handlers = _Handlers(services)
    offering = [controls.base, controls.subjects, touched]
    estimate: dict[str, Any] = {
        "fn": handlers.estimate, "inputs": [controls.base, controls.steps], "outputs": controls.estimate, **QUIET,
        "preprocess": False,  # a slider whose number is just being typed has none, and Gradio would stumble over it
    }  # fmt: skip
    page.load(handlers.refresh, offering, controls.subjects, **QUIET).then(**estimate)
    controls.subjects.input(lambda: True, None, touched, **QUIET)
    controls.base.input(handlers.rebase, controls.base, [controls.subjects, touched], **QUIET).then(**estimate)
    controls.steps.change(**estimate)
    polled = [chosen, seen, jobs, *detail.all]
    controls.go.click(handlers.start, controls.recipe, chosen, **QUIET).then(
        handlers.poll, [chosen, seen], polled, **QUIET
    )
    kind.change(
        lambda value: [gr.update(visible=value == "gates"), gr.update(visible=value == "subject")],
        kind, [gates_box, subject_box], **QUIET,
    )  # fmt: skip
    started = [chosen, form.said, form.pictures, form.strip]
    form.go.click(form.start, form.fields, started, **QUIET).then(
        handlers.poll, [chosen, seen], polled, **QUIET
    )
    for button, action in (
        (detail.pause, handlers.pause), (detail.resume, handlers.resume), (detail.sample, handlers.sample),
    ):  # fmt: skip
        button.click(action, chosen, None, **QUIET)
    detail.remove.click(handlers.remove, chosen, None, js=SURE, **QUIET)
    jobs.click(handlers.choose, None, chosen, **QUIET).then(handlers.poll, [chosen, seen], polled, **QUIET)
    detail.cancel.click(handlers.cancel, chosen, None, **QUIET)
    timer.tick(handlers.poll, [chosen, seen], polled, **POLLING)
    return TrainTab(
        use=detail.use,
        chosen=chosen,
        refresh=handlers.refresh,
        offering=offering,
        offered=controls.subjects,
        picked=handlers.picked,
    )


def _controls(services: Services) -> Controls:
    blocked = services.jobs.blocked
    if blocked:
        gr.HTML(notes([note(blocked, "warn")]))
    subjects = gr.CheckboxGroup(
        label="Subjects", info="Two or more, made for one base.", choices=[], elem_classes="pills", elem_id="experts"
    )
    estimate = gr.HTML(elem_id="estimate")
    go = gr.Button("Train gates", variant="primary", interactive=blocked is None, elem_id="train")
    with gr.Accordion("Advanced", open=False, elem_classes="fold", elem_id="train-advanced"):
        base = gr.Dropdown(
            label="Base",
            choices=base_choices(services.settings),
            value=services.settings.base,
            filterable=False,
        )
        scope = gr.Radio(label="One weight per subject for", choices=SCOPES, value="token", elem_classes="pills")
        steps = gr.Slider(
            label="Steps", minimum=10, maximum=2000, step=10, value=GateRecipe().steps, elem_id="train-steps"
        )
        lr = gr.Number(label="Learning rate", info="0 = what suits the base.", value=0)
        alpha = gr.Number(label="Balance", info="How strongly equal shares are kept.", value=GateRecipe().alpha)
        seed = gr.Number(label="Seed", value=0, precision=0)
    return Controls(subjects, estimate, go, base, scope, steps, lr, alpha, seed)


def _detail() -> Detail:
    top = gr.HTML(elem_id="job-head")
    with gr.Row(elem_classes="actions", elem_id="job-actions"):
        use = gr.Button("Generate with it", variant="primary", visible=False, size="md", elem_id="use-gates")
        resume = gr.Button("Go on", variant="primary", visible=False, size="md", min_width=90, elem_id="resume-job")
        pause = gr.Button("Pause", visible=False, size="md", min_width=90, elem_id="pause-job")
        sample = gr.Button("Picture now", visible=False, size="md", min_width=110, elem_id="sample-job")
        cancel = gr.Button("Cancel", variant="stop", visible=False, size="md", elem_id="cancel-job")
        remove = gr.Button("Remove", visible=False, size="md", min_width=90, elem_id="remove-job")
    line = gr.HTML(elem_id="job-curve")
    pictures = gr.HTML(elem_id="job-samples")
    with gr.Accordion("Log", open=False, visible=False, elem_classes="fold") as box:
        log = gr.HTML(elem_id="job-log")
    return Detail(top, line, pictures, box, log, use, resume, pause, sample, cancel, remove)


class _Handlers:
    """What happens on the tab; every method checks whose jobs it touches."""

    def __init__(self, services: Services) -> None:
        self._services = services

    def _owner(self, request: gr.Request) -> str:
        return owner_of(self._services.settings, request)

    @guarded
    def refresh(self, base: str, picked: list[str], touched: bool, request: gr.Request) -> Any:
        """Offer what the library holds now; the two newest are proposed until the visitor has chosen."""
        entries = self._services.offered(base, self._owner(request))
        known = [entry.sha256 for entry in entries]
        kept = [sha for sha in picked or [] if sha in known] if touched else known[:2]
        return gr.update(choices=[(e.name, e.sha256) for e in entries], value=kept)

    @guarded
    def rebase(self, base: str, request: gr.Request) -> list[Any]:
        """Another base has other experts."""
        return [self.refresh(base, [], False, request), False]

    @guarded
    def estimate(self, base: str, steps: float | None) -> str:
        """How long it will take, in words."""
        return block(f'<p class="muted">{self._services.jobs.estimate(base, _steps(steps))}</p>')

    @guarded
    def start(
        self, base: str, picked: list[str], scope: str, steps: float | None, lr: float | None, alpha: float | None,
        seed: float | None, request: gr.Request,
    ) -> str:  # fmt: skip
        """Queue a job and choose it; an emptied field stands for the usual value."""
        alpha = GateRecipe.alpha if alpha is None else float(alpha)
        recipe = GateRecipe(
            scope=scope, steps=_steps(steps), lr=float(lr or 0) or None, alpha=alpha, seed=int(seed or 0)
        )
        return self._services.jobs.train_gates(base, picked, recipe, self._owner(request))

    @guarded
    def choose(self, event: gr.EventData) -> str:
        """A job of the list was clicked."""
        return str(event.id)

    @guarded
    def cancel(self, chosen: str, request: gr.Request) -> None:
        """Ask the chosen job to stop."""
        self._services.jobs.cancel(chosen, self._owner(request))
        gr.Info("The job stops after the step it is at.", title="", duration=4)

    @guarded
    def pause(self, chosen: str, request: gr.Request) -> None:
        """Ask the chosen job to free the device until it goes on."""
        self._services.jobs.pause(chosen, self._owner(request))
        gr.Info("The job pauses after the step it is at.", title="", duration=4)

    @guarded
    def resume(self, chosen: str, request: gr.Request) -> None:
        """Go on with a paused, cancelled or failed job from its last checkpoint."""
        owner = self._owner(request)
        failed = self._services.jobs.made(chosen, owner)[0].state == "failed"
        (self._services.jobs.retry if failed else self._services.jobs.resume)(chosen, owner)

    @guarded
    def remove(self, chosen: str, request: gr.Request) -> None:
        """Forget the chosen job, where the visitor said so once more."""
        if chosen:
            self._services.jobs.remove(chosen, self._owner(request))

    @guarded
    def sample(self, chosen: str, request: gr.Request) -> None:
        """Ask the chosen job for a picture."""
        self._services.jobs.sample_now(chosen, self._owner(request))
        gr.Info("A picture comes after the step it is at.", title="", duration=4)

    @guarded
    def picked(self, chosen: str, request: gr.Request) -> tuple[str, list[str], str]:
        """Base, experts and composition file of the chosen job."""
        job, path = self._services.jobs.made(chosen, self._owner(request))
        return str(job.config["base"]), [str(expert["sha256"]) for expert in job.config["experts"]], str(path or "")

    @guarded
    def poll(self, chosen: str, seen: dict[str, int], request: gr.Request) -> list[Any]:
        """Draw what has changed since the page last looked."""
        owner = self._owner(request)
        for name in self._services.subjects.collect(owner):
            gr.Info(f"{escape(name)} is in the library now.", title="", duration=6)
        jobs = self._services.jobs.list(owner)
        if not jobs:
            parts: Sequence[Any] = [empty("No training yet. Gates and subjects are learned in the background.")]
            return ["", *_changed(seen, [*parts, "", "", "", False, "", *[False] * 6])]
        chosen = chosen if any(job.id == chosen for job in jobs) else jobs[0].id
        view = self._services.jobs.view(chosen, owner)
        state, busy = view.job.state, view.job.state == "running" and not view.job.cancel and not view.job.pause
        waits = state in ("queued", "running", "paused") and not view.job.cancel
        parts = [
            job_list(jobs, chosen),
            head(view),
            curve(view),
            samples(view),
            bool(view.log),
            log_html(view),
            state == "finished" and view.job.kind == "gate",
            state in ("paused", "cancelled", "failed"),
            busy,
            busy and view.job.step > 0,
            waits,
            state in TERMINAL,
        ]
        return [chosen, *_changed(seen, parts)]


def _steps(steps: float | None) -> int:
    return GateRecipe.steps if steps is None else int(steps)


def _changed(seen: dict[str, int], parts: Sequence[Any]) -> list[Any]:
    """(what was sent, update per part): a part that has not changed is left alone, so nothing flickers."""
    now = {str(index): hash(part) for index, part in enumerate(parts)}
    updates = [
        gr.skip()
        if seen.get(str(index)) == now[str(index)]
        else (gr.update(visible=part) if isinstance(part, bool) else part)
        for index, part in enumerate(parts)
    ]
    return [now, *updates]
