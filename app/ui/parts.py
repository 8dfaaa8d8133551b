"""Small pieces of HTML that the tabs share. Every word of a user is escaped here."""

from __future__ import annotations

from collections.abc import Iterable
from functools import lru_cache
from html import escape
from pathlib import Path

from app.pictures import thumbnail_uri
from app.records import Entry
from app.settings import Settings

__all__ = ["base_choices", "block", "card", "chip", "empty", "face", "masthead", "note"]

CLICKS = """
element.addEventListener('click', (event) => {
  const target = event.target.closest('[data-id]');
  if (target) { trigger('click', {id: target.dataset.id}); }
});
"""
"""Script of an HTML component whose elements with data-id can be clicked: the handler receives the id."""

LOGO = (
    '<svg width="38" height="38" viewBox="0 0 38 38" aria-hidden="true"><circle cx="14" cy="19" r="12" '
    'fill="var(--s1)"/><circle cx="24" cy="19" r="12" fill="var(--s2)" fill-opacity=".82"/></svg>'
)
MOON = (
    '<svg width="18" height="18" viewBox="0 0 24 24" fill="none" stroke="currentColor" stroke-width="1.8" '
    'stroke-linecap="round" stroke-linejoin="round" aria-hidden="true">'
    '<path d="M20 14.5A8 8 0 0 1 9.5 4a8 8 0 1 0 10.5 10.5z"/></svg>'
)
TOGGLE = (
    "const dark = document.body.classList.toggle('dark'); localStorage.setItem('mole-theme', dark ? 'dark' : 'light')"
)


def block(content: str) -> str:
    """HTML in the page's own type."""
    return f'<div class="mole">{content}</div>'


def masthead() -> str:
    """Name, what it is for, and the switch between light and dark."""
    return block(
        f'<header class="masthead">{LOGO}<div><h1>MoLE Diffusion</h1>'
        "<p>Several LoRAs in one picture, each still itself.</p></div>"
        f'<span class="spring"></span><button class="ghost" title="Light or dark" aria-label="Light or dark" '
        f'onclick="{TOGGLE}">{MOON}</button></header>'
    )


def chip(text: str, kind: str = "") -> str:
    """A short fact in a capsule."""
    return f'<span class="chip {kind}">{escape(text)}</span>'


def note(text: str, kind: str = "", strong: str = "") -> str:
    """A sentence in a quiet box; ``kind`` "bad" or "warn" colours it."""
    lead = f"<b>{escape(strong)}</b> " if strong else ""
    role = ' role="alert"' if kind == "bad" else ""
    return f'<div class="note {kind}"{role}><div>{lead}{escape(text)}</div></div>'


def notes(items: Iterable[str]) -> str:
    """Several boxes below each other."""
    return block(f'<div class="notes">{"".join(items)}</div>')


def base_choices(settings: Settings) -> list[tuple[str, str]]:
    """The bases that may be chosen: (title, name)."""
    from mole_diffusion.bases import BASES

    return [(BASES.get(name, Path(name).name), name) for name in settings.base_names]


def empty(text: str) -> str:
    """What stands where nothing is yet."""
    return block(f'<div class="empty">{escape(text)}</div>')


def face(entry: Entry, small: bool = False) -> str:
    """A view of the subject, or its initial."""
    size = "face small" if small else "face"
    if entry.views:
        address = _thumbnail(entry.views[0], entry.views[0].stat().st_mtime_ns)
        return f'<img class="{size}" src="{address}" alt="{escape(entry.name, quote=True)}">'
    return f'<span class="{size}" aria-hidden="true">{escape(entry.name[:1].upper())}</span>'


def card(entry: Entry, selected: bool = False) -> str:
    """A subject of the library: face, name, what its file is."""
    chips = [chip(entry.trigger, "trigger") if entry.trigger else chip("no trigger", "bad")]
    if entry.builtin:
        chips.append(chip("demo"))
    if not entry.views:
        chips.append(chip("no pictures yet"))
    on = " on" if selected else ""
    return (
        f'<button class="card{on}" data-id="{entry.sha256}">{face(entry)}<div><h3>{escape(entry.name)}</h3>'
        f'<p>{escape(entry.sentence)}</p><div class="row">{"".join(chips)}</div></div></button>'
    )


@lru_cache(maxsize=256)
def _thumbnail(path: Path, _modified: int) -> str:
    return thumbnail_uri(path, 232)


def picture_strip(paths: Iterable[Path]) -> str:
    """Small square pictures in a row."""
    images = "".join(
        f'<img src="{_thumbnail(path, path.stat().st_mtime_ns)}" alt="View {number}">'
        for number, path in enumerate(paths, 1)
    )
    return f'<div class="strip">{images}</div>' if images else ""
