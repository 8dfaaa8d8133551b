"""Endpoints for programs: gradio_client and others call what the page does by name."""

from __future__ import annotations

import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

import gradio as gr

from app.orders import orders_for
from app.plan import METHODS, default_prompt
from app.services import Services, owner_of
from app.ui.library import forget
from mole_diffusion.errors import InvalidRequest, MoleError

__all__ = ["add_api"]

KEPT_SECONDS = 600


def add_api(services: Services) -> None:
    """Add /inspect, /list_subjects and /generate; they have no place on the page.

    ``/inspect(file)`` → what the file is; nothing is stored.
    ``/list_subjects()`` → the subjects that this visitor may name.
    ``/generate(prompt, subjects, method, …)`` → PNG files and their parameters with scores.
    """
    calls = _Calls(services)
    with gr.Group(visible=False):
        file = gr.File(label="file")
        answer = gr.JSON(label="answer")
        gr.Button().click(calls.inspect, file, answer, api_name="inspect")
        gr.Button().click(calls.subjects, None, answer, api_name="list_subjects")
        inputs = [
            gr.Textbox(label="prompt"),
            gr.Dropdown(label="subjects", multiselect=True, allow_custom_value=True, choices=[], value=[]),
            gr.Dropdown(label="method", choices=list(METHODS), value="gates"),
            gr.Number(label="seed", value=0, precision=0),
            gr.Number(label="steps", precision=0),
            gr.Number(label="guidance"),
            gr.Number(label="count", value=1, precision=0),
            gr.Textbox(label="negative", value=""),
            gr.Textbox(label="base", value=services.settings.base),
        ]
        outputs = [gr.File(label="pictures", file_count="multiple"), gr.JSON(label="parameters")]
        gr.Button().click(
            calls.generate, inputs, outputs, api_name="generate", concurrency_id="gpu", concurrency_limit=1
        )


class _Calls:
    """The functions behind the endpoints; a MoleError reaches the caller as its sentence."""

    def __init__(self, services: Services) -> None:
        self._services = services
        self._outbox = tempfile.TemporaryDirectory(prefix="mole-")

    def inspect(self, file: str) -> dict[str, Any]:
        """What a LoRA file is, and which base it fits."""
        from app.words import sentence

        path = Path(file)
        try:
            inspection, family = self._services.library.inspect(path)
        except MoleError as error:
            raise gr.Error(str(error), print_exception=False) from error
        finally:
            forget(path)
        return {**inspection.to_json(), "family": family, "sentence": sentence(inspection, family)}

    def subjects(self, request: gr.Request) -> list[dict[str, Any]]:
        """Names, triggers and hashes of the subjects in the library."""
        entries = self._services.library.entries(owner_of(self._services.settings, request))
        return [
            {"name": e.name, "trigger": e.trigger, "class": e.subject_class, "family": e.family, "sha256": e.sha256}
            for e in entries
        ]

    def generate(
        self, prompt: str, subjects: list[str], method: str, seed: int | None, steps: int | None = None,
        guidance: float | None = None, count: int | None = None, negative: str = "", base: str = "",
        request: gr.Request | None = None,
    ) -> tuple[list[str], list[dict[str, Any]]]:  # fmt: skip
        """Make pictures and wait for them; without steps and guidance they are the base's own."""
        owner = owner_of(self._services.settings, request)
        try:
            experts = self._hashes(subjects or [], owner)
            entries = [self._services.library.get(sha256, owner) for sha256 in experts]
            orders = orders_for(
                self._services, owner, base=base, experts=experts, method=method,
                prompt=prompt or default_prompt(entries), beside=False, seed=seed, steps=steps, guidance=guidance,
                count=count, negative=negative, left_out=[],
            )  # fmt: skip
            session = self._services.sessions.start(orders, owner)
        except MoleError as error:
            raise gr.Error(str(error), print_exception=False) from error
        shot = self._services.sessions.wait(session).shots[0]
        if shot.rendered is None:
            raise gr.Error(shot.error or "The picture was stopped.", print_exception=False)
        return self._handed_out([picture.path for picture in shot.pictures]), shot.rendered.parameters

    def _hashes(self, names: list[str], owner: str) -> list[str]:
        entries = self._services.library.entries(owner)
        known = {entry.name: entry.sha256 for entry in entries} | {entry.sha256: entry.sha256 for entry in entries}
        missing = [name for name in names if name not in known]
        if missing:
            raise InvalidRequest(f"There is no subject {missing[0]!r}; known are {', '.join(e.name for e in entries)}.")
        return [known[name] for name in names]

    def _handed_out(self, paths: list[Path]) -> list[str]:
        """Copies outside the data folder, which Gradio may not read; those of earlier calls are removed."""
        folder = Path(self._outbox.name)
        for old in folder.iterdir():
            if time.time() - old.stat().st_ctime > KEPT_SECONDS:
                old.unlink(missing_ok=True)
        return [str(shutil.copy(path, folder / path.name)) for path in paths]
