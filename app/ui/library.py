"""Library tab: drop LoRA files, read what each one is, name it, show what its subject looks like."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

import gradio as gr

from app.library import MAX_VIEWS, Added
from app.records import Entry
from app.services import Services, owner_of
from app.sessions import SORRY
from app.ui.errors import guarded
from app.ui.parts import CLICKS, block, card, empty, note, notes
from mole_diffusion.errors import MoleError

__all__ = ["LibraryTab", "library_tab"]

logger = logging.getLogger(__name__)
EDITOR_INTO_VIEW = """() => setTimeout(
  () => document.querySelector('#editor')?.scrollIntoView({block: 'nearest', behavior: 'smooth'}), 60)"""


@dataclass(frozen=True)
class Editor:
    """The fields that change one entry; hidden until a card is chosen."""

    box: gr.Column
    heading: gr.HTML
    name: gr.Textbox
    trigger: gr.Textbox
    subject_class: gr.Textbox
    views: gr.File
    gallery: gr.HTML
    actions: gr.Row
    save: gr.Button
    remove: gr.Button

    @property
    def shown(self) -> list[Any]:
        """What changes when another entry is chosen."""
        fields = [self.name, self.trigger, self.subject_class]
        return [self.box, self.heading, *fields, self.gallery, self.views, self.actions]


@dataclass(frozen=True)
class LibraryTab:
    """Handles for the page; ``onward`` leads to the next step once two subjects are there."""

    cards: gr.HTML
    onward: gr.Button
    chosen: gr.State
    refresh: Any


def library_tab(services: Services, page: gr.Blocks) -> LibraryTab:
    """Lay out the tab and bind it."""
    chosen = gr.State("")
    with gr.Row(elem_classes="split"):
        with gr.Column(elem_classes="side"):
            files = gr.File(
                label="LoRA files",
                show_label=False,
                file_count="multiple",
                height=150,
                elem_id="upload",
                elem_classes="dropzone",
            )
            gr.HTML(
                block(
                    '<p class="muted">Drop <b>.safetensors</b> LoRAs of subjects, two or more. '
                    f"{'Only you see them' if services.settings.space else 'They stay on this machine'}.</p>"
                )
            )
            said = gr.HTML(elem_id="upload-notes")
            onward = gr.Button("Train gates for them", variant="primary", visible=False, elem_id="onward")
            editor = _editor()
        with gr.Column(elem_classes="main"):
            cards = gr.HTML(elem_id="cards", js_on_load=CLICKS)
    handlers = _Handlers(services)
    _bind(handlers, page, files, said, onward, cards, chosen, editor)
    return LibraryTab(cards, onward, chosen, handlers.cards)


def _editor() -> Editor:
    with gr.Column(visible=False, elem_id="editor", elem_classes="editor") as box:
        heading = gr.HTML()
        name = gr.Textbox(label="Name", max_lines=1)
        trigger = gr.Textbox(label="Trigger", info="The words it was trained with.", max_lines=1)
        subject_class = gr.Textbox(label="Class", info="What it is, in a plain word: dog, robot, vase.", max_lines=1)
        gallery = gr.HTML()
        views = gr.File(
            label="Pictures",
            show_label=False,
            file_count="multiple",
            file_types=["image"],
            height=120,
            elem_id="views",
            elem_classes="dropzone low",
        )
        with gr.Row(elem_classes="actions") as actions:
            save = gr.Button("Save", variant="primary", size="md", elem_id="save-entry")
            remove = gr.Button("Remove", variant="stop", size="md", min_width=90)
    return Editor(box, heading, name, trigger, subject_class, views, gallery, actions, save, remove)


def _bind(
    handlers: _Handlers,
    page: gr.Blocks,
    files: gr.File,
    said: gr.HTML,
    onward: gr.Button,
    cards: gr.HTML,
    chosen: gr.State,
    editor: Editor,
) -> None:
    quiet: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}
    page.load(handlers.cards, chosen, cards, **quiet)
    files.upload(handlers.upload, [files, chosen], [files, said, cards, chosen, onward], api_visibility="private").then(
        handlers.edit, chosen, editor.shown, **quiet
    )
    cards.click(handlers.choose, None, [chosen, said], **quiet).then(handlers.edit, chosen, editor.shown, **quiet).then(
        handlers.cards, chosen, cards, **quiet
    ).then(None, js=EDITOR_INTO_VIEW)
    fields = [chosen, editor.name, editor.trigger, editor.subject_class]
    editor.save.click(handlers.save, fields, [said, cards], **quiet)
    editor.views.upload(handlers.views, [chosen, editor.views], [editor.views, said, cards], **quiet).then(
        handlers.edit, chosen, editor.shown, **quiet
    )
    editor.remove.click(handlers.remove, chosen, [chosen, said, cards], **quiet).then(
        handlers.edit, chosen, editor.shown, **quiet
    )


class _Handlers:
    """What happens on the tab; every method checks whose library it touches."""

    def __init__(self, services: Services) -> None:
        self._services = services

    def _owner(self, request: gr.Request) -> str:
        return owner_of(self._services.settings, request)

    @guarded
    def cards(self, chosen: str, request: gr.Request) -> str:
        """All cards."""
        return self._cards(chosen, self._owner(request))

    def _cards(self, chosen: str, owner: str) -> str:
        entries = self._services.library.entries(owner)
        if not entries:
            return empty("No subjects yet. Drop two LoRA files to begin.")
        return block(f'<div class="cards">{"".join(card(e, e.sha256 == chosen) for e in entries)}</div>')

    @guarded
    def upload(self, paths: list[str] | None, chosen: str, request: gr.Request) -> tuple[Any, str, str, str, Any]:
        """Store what can be stored; say of every file what became of it."""
        owner = self._owner(request)
        said, stored = [], []
        for path in [Path(name) for name in paths or []]:
            try:
                added = self._services.library.add(path, path.name, owner)
                said.append(_welcome(added, path.name))
                stored.append(added.entry)
            except MoleError as error:
                said.append(note(str(error), "bad", path.name))
            except Exception:
                logger.exception("An upload failed.")
                said.append(note(SORRY, "bad", path.name))
            finally:
                forget(path)
        incomplete = [entry for entry in stored if not entry.trigger]
        chosen = next((entry.sha256 for entry in [*incomplete, *stored]), chosen)
        own = sum(not entry.builtin for entry in self._services.library.entries(owner))
        onward = gr.update(visible=bool(stored) and own > 1)
        return None, notes(said), self._cards(chosen, owner), chosen, onward

    @guarded
    def choose(self, event: gr.EventData) -> tuple[str, str]:
        """A card was clicked."""
        return str(event.id), ""

    @guarded
    def edit(self, chosen: str, request: gr.Request) -> list[Any]:
        """Fill the editor with the chosen entry."""
        entries = {e.sha256: e for e in self._services.library.entries(self._owner(request))}
        entry = entries.get(chosen)
        if entry is None:
            return [gr.update(visible=False), *[gr.skip()] * 7]
        free = not entry.builtin
        return [
            gr.update(visible=True),
            block(f'<p class="section">{escape(entry.name)}{"" if free else " · part of the demo"}</p>'),
            gr.update(value=entry.name, visible=free),
            gr.update(value=entry.trigger, visible=free),
            gr.update(value=entry.subject_class, visible=free),
            _gallery(entry),
            gr.update(value=None, visible=free),
            gr.update(visible=free),
        ]

    @guarded
    def save(self, chosen: str, name: str, trigger: str, subject_class: str, request: gr.Request) -> tuple[str, str]:
        """Store the words of the editor."""
        owner = self._owner(request)
        library = self._services.library
        entry = library.update(chosen, owner, name=name, trigger=trigger, subject_class=subject_class)
        said = [note("Saved.", strong=entry.name), *[note(w, "warn") for w in library.warnings(entry, owner)]]
        return notes(said), self._cards(chosen, owner)

    @guarded
    def views(self, chosen: str, paths: list[str] | None, request: gr.Request) -> tuple[Any, str, str]:
        """Store pictures of the chosen subject."""
        owner = self._owner(request)
        pictures = [Path(name) for name in paths or []]
        try:
            entry = self._services.library.set_views(chosen, owner, pictures=pictures)
            said = note(f"{len(entry.views)} pictures stored: identity can be scored now.", strong=entry.name)
        except MoleError as error:
            said = note(str(error), "bad")
        finally:
            for path in pictures:
                forget(path)
        return None, notes([said]), self._cards(chosen, owner)

    @guarded
    def remove(self, chosen: str, request: gr.Request) -> tuple[str, str, str]:
        """Forget the chosen entry."""
        owner = self._owner(request)
        name = self._services.library.get(chosen, owner).name
        self._services.library.remove(chosen, owner)
        return "", notes([note("Removed.", strong=name)]), self._cards("", owner)


def forget(path: Path) -> None:
    """Delete an upload from Gradio's cache, where anyone with its address could read it."""
    path.unlink(missing_ok=True)
    if path.parent.is_dir() and not any(path.parent.iterdir()):
        path.parent.rmdir()


def _welcome(added: Added, filename: str) -> str:
    if added.known:
        return note(added.warnings[0], strong=filename)
    return note(added.entry.sentence, strong=added.entry.name) + "".join(note(w, "warn") for w in added.warnings)


def _gallery(entry: Entry) -> str:
    from app.ui.parts import picture_strip

    words = "Identity is scored against these pictures." if entry.views else (
        f"Drop 1 to {MAX_VIEWS} pictures of the subject, and identity can be scored."
    )  # fmt: skip
    return block(f'<p class="section">Pictures</p>{picture_strip(entry.views)}<p class="muted">{words}</p>')
