"""The form for a new subject: pictures, what it is called, LoRA or MoSLoRA, start."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gradio as gr

from app.pictures import open_picture, thumbnail_uri
from app.services import Services, owner_of
from app.subjects import SubjectRecipe
from app.ui.errors import guarded
from app.ui.library import forget
from app.ui.parts import base_choices, block, note, notes
from mole_diffusion.errors import MoleError

__all__ = ["SubjectForm", "subject_form"]

QUIET: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}
ADAPTERS = [("MoSLoRA, with a mixer", "moslora"), ("LoRA", "lora")]


@dataclass(frozen=True)
class SubjectForm:
    """The fields; ``start`` takes them in the order of ``fields`` and gives (job id, note, no pictures, no strip)."""

    pictures: gr.State
    strip: gr.HTML
    token: gr.Textbox
    subject_class: gr.Textbox
    adapter: gr.Radio
    said: gr.HTML
    go: gr.Button
    preset: gr.Dropdown
    steps: gr.Number
    rank: gr.Number
    seed: gr.Number
    base: gr.Dropdown
    start: Any

    @property
    def fields(self) -> list[Any]:
        """What a job is started with."""
        return [
            self.pictures, self.token, self.subject_class, self.adapter, self.preset, self.steps, self.rank, self.seed,
            self.base,
        ]  # fmt: skip


def subject_form(services: Services) -> SubjectForm:
    """Lay out the form."""
    blocked = services.jobs.blocked
    pictures, strip_of = gr.State([]), _looker()
    upload = gr.File(
        label="Pictures", show_label=False, file_count="multiple", file_types=["image"], height=120,
        elem_id="subject-pictures", elem_classes="dropzone low",
    )  # fmt: skip
    strip = gr.HTML(elem_id="subject-strip")
    upload.upload(strip_of, [upload, pictures], [upload, pictures, strip], **QUIET)
    with gr.Row():
        token = gr.Textbox(label="Trigger", info="A new word: zwx.", max_lines=1, min_width=120,
                           elem_id="subject-token")  # fmt: skip
        subject_class = gr.Textbox(label="Class", info="dog, robot, vase.", max_lines=1, min_width=120,
                                   elem_id="subject-class")  # fmt: skip
    adapter = gr.Radio(label="Adapter", choices=ADAPTERS, value="moslora", elem_classes="pills", elem_id="adapter")
    said = gr.HTML(elem_id="subject-notes")
    go = gr.Button("Train subject", variant="primary", interactive=blocked is None, elem_id="train-subject")
    with gr.Accordion("Advanced", open=False, elem_classes="fold", elem_id="subject-advanced"):
        base = gr.Dropdown(
            label="Base", choices=base_choices(services.settings), value=services.settings.base, filterable=False
        )
        preset = gr.Dropdown(
            label="Fit for", info="Full-size bases only; the demo fits everywhere.", choices=_presets(), value="",
            filterable=False,
        )  # fmt: skip
        steps = gr.Number(label="Steps", info="0 = what suits the base.", value=0, precision=0, elem_id="subject-steps")
        rank = gr.Number(label="Rank", info="0 = what suits the base.", value=0, precision=0)
        seed = gr.Number(label="Seed", value=0, precision=0)
    start = _starter(services)
    return SubjectForm(pictures, strip, token, subject_class, adapter, said, go, preset, steps, rank, seed, base, start)


def _presets() -> list[tuple[str, str]]:
    from training.presets import PRESETS

    return [("this base as it is", ""), *((f"{item.name}: {item.trades}", item.name) for item in PRESETS.values())]


def _looker() -> Any:
    @guarded
    def look(uploads: list[str] | None, held: list[str]) -> tuple[Any, list[str], str]:
        """Add uploads that are pictures to those that are held, and show them; the rest is refused by name."""
        shown, kept, refused = [], [], []
        given: list[str] = [*held, *(uploads or [])]
        for path in dict.fromkeys(given):
            try:
                shown.append(thumbnail_uri(open_picture(Path(path)), 96))
                kept.append(path)
            except MoleError as error:
                forget(Path(path))
                refused.append(note(str(error), "bad"))
        images = "".join(f'<img src="{uri}" alt="Picture {number}">' for number, uri in enumerate(shown, 1))
        return gr.update(value=None), kept, block(f'<div class="strip">{images}</div>') + notes(refused)

    return look


def _starter(services: Services) -> Any:
    @guarded
    def start(
        pictures: list[str] | None, token: str, subject_class: str, adapter: str, preset: str, steps: float | None,
        rank: float | None, seed: float | None, base: str, request: gr.Request,
    ) -> tuple[str, str, list[str], str]:  # fmt: skip
        """Queue the training of a subject; an emptied number stands for the usual one."""
        recipe = SubjectRecipe(
            base, token, subject_class, adapter, preset or None, int(steps or 0) or None, int(rank or 0) or None,
            int(seed or 0),
        )  # fmt: skip
        paths = [Path(name) for name in pictures or []]
        job, warnings = services.subjects.train(paths, recipe, owner_of(services.settings, request))
        for path in paths:
            forget(path)
        return job, notes(note(warning, "warn") for warning in warnings) if warnings else "", [], ""

    return start
