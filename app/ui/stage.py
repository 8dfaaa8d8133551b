"""The stage: previews and pictures, how they score while they are made, and what made them."""

from __future__ import annotations

import json
from html import escape
from statistics import fmean
from typing import Any

from app.jobs import duration
from app.pictures import data_uri
from app.records import Entry
from app.sessions import Session, Shot
from app.ui.charts import Series, line_chart, nice_range
from app.ui.parts import block, face, note
from app.ui.theme import SERIES
from app.words import alignment_name

__all__ = ["invitation", "results", "shot_html", "status"]

INK = "var(--body-text-color)"


def invitation(entries: list[Entry], ready: bool) -> str:
    """What stands on the stage before the first picture."""
    if not entries:
        return block('<div class="invite"><p>Choose two subjects, or upload your own in the library.</p></div>')
    plus = '<span aria-hidden="true">+</span>'
    faces = plus.join(f"<figure>{face(entry)}<span>{escape(entry.name)}</span></figure>" for entry in entries)
    words = (
        "Press Generate: one picture with all of them, scored while it is made."
        if ready
        else "Press Generate for a picture, or train gates for these subjects first: they keep each one itself."
    )
    return block(f'<div class="invite"><div class="faces">{faces}</div><p>{escape(words)}</p></div>')


def shot_html(shot: Shot, siblings: Session) -> str:
    """One method's picture: preview or result, its caption and its alignment so far."""
    return block(
        f'<figure class="shot">{_frame(shot)}{_caption(shot)}{_chart(shot, siblings)}{_unscored(shot)}</figure>'
    )


def status(session: Session | None) -> str:
    """One quiet line: what is going on."""
    if session is None:
        return ""
    shot = session.active
    if shot is not None:
        where = f" ({session.shots.index(shot) + 1} of {len(session.shots)})" if len(session.shots) > 1 else ""
        words = shot.note or f"Step {shot.step} of {shot.steps}"
        return block(
            f'<div class="status" role="status"><span class="chip live">{escape(shot.title)}{where}</span>'
            f'<span class="num">{escape(words)}</span></div>'
        )
    return block(f'<div class="status" role="status">{escape(_ending(session))}</div>')


def results(session: Session) -> str:
    """Scores side by side and the parameters, once the session is over."""
    done = [shot for shot in session.shots if shot.state == "done" and shot.rendered]
    failed = [note(shot.error, "bad", f"{shot.title}.") for shot in session.shots if shot.state == "failed"]
    if not done:
        return block(f'<div class="notes">{"".join(failed)}</div>') if failed else ""
    scored = [shot for shot in done if shot.rendered and not shot.rendered.unscored]
    table = f'<div class="panel">{_table(scored)}</div>' if scored else ""
    return block("".join(failed) + table + _parameters(done))


# -- pictures --------------------------------------------------------------------------------------------------


def _frame(shot: Shot) -> str:
    if shot.pictures:
        cells = "".join(_cell(shot, index) for index in range(len(shot.pictures)))
        return f'<div class="frame{" many" if len(shot.pictures) > 1 else ""}" tabindex="0">{cells}</div>'
    if shot.state in ("failed", "cancelled"):
        words = "Stopped" if shot.state == "cancelled" else "This picture could not be made."
        last = f'<img class="ended" src="{shot.preview}" alt="">' if shot.preview else ""
        return f'<div class="frame">{last}<div class="await">{words}</div></div>'
    inside = f'<img src="{shot.preview}" alt="Preview">' if shot.preview else ""
    if not inside:
        inside = f'<div class="await">{escape(shot.note or "Next")}</div>'
    part = 100 * shot.step / max(shot.steps, 1)
    return f'<div class="frame">{inside}<div class="bar" style="--p:{part:.0f}%"><i></i></div></div>'


def _cell(shot: Shot, index: int) -> str:
    odd = len(shot.pictures) % 2 == 1 and index == len(shot.pictures) - 1
    picture = shot.pictures[index]
    words = escape(f"{shot.title}: {shot.order.prompt}", quote=True)
    image = f'<img src="{data_uri(picture.png)}" alt="{words}">'
    return f'<div class="cell{" alone" if odd else ""}">{image}{_boxes(shot, index)}</div>'


def _boxes(shot: Shot, index: int) -> str:
    """Where each subject was found, shown while the pointer is on the picture."""
    if shot.rendered is None or index >= len(shot.rendered.identity):
        return ""
    found = shot.rendered.identity[index]
    drawn = []
    for number, subject in enumerate(shot.order.subjects):
        if subject.name not in found:
            continue
        left, top, right, bottom = (100 * value for value in found[subject.name].box)
        place = f"left:{left:.1f}%;top:{top:.1f}%;width:{right - left:.1f}%;height:{bottom - top:.1f}%"
        label = f"{escape(subject.name)} {found[subject.name].score:.2f}"
        drawn.append(f'<div class="box" style="--c:{_colour(number)};{place}"><span>{label}</span></div>')
    return "".join(drawn)


def _caption(shot: Shot) -> str:
    words = f"seed {shot.order.seed}"
    if shot.state == "done":
        words += f" · {duration_short(shot.seconds)}"
    links = ""
    for index, picture in enumerate(shot.pictures):
        name = "Save PNG" if len(shot.pictures) == 1 else f"PNG {index + 1}"
        links += f'<a download="{escape(picture.path.name)}" href="{data_uri(picture.png)}">{name}</a>'
    title = f"<strong>{escape(shot.title)}</strong>"
    return f'<figcaption>{title}<span class="muted num">{words}</span>{links}</figcaption>'


def duration_short(seconds: float) -> str:
    """ "8 s" or "3 minutes"."""
    return f"{seconds:.0f} s" if seconds < 90 else duration(seconds)


# -- alignment while it is made ----------------------------------------------------------------------------------


def _chart(shot: Shot, siblings: Session) -> str:
    if not any(shot.alignment):
        return ""
    lines = [Series("prompt", INK, _points(shot, "prompt"))]
    for number, subject in enumerate(shot.order.subjects):
        lines.append(Series(subject.name, _colour(number), _points(shot, subject.name)))
    everything = [value for each in siblings.shots for step in each.alignment for value in step.values()]
    heading = f'<p class="section">{escape(alignment_name(shot.order.base))} per step</p>'
    return heading + line_chart(
        [line for line in lines if line.points],
        x_end=shot.steps,
        x_words=("step 1", f"step {shot.steps}"),
        y_range=nice_range(everything),
        label=f"Alignment of {shot.title} per step",
    )


def _unscored(shot: Shot) -> str:
    why = shot.rendered.unscored if shot.rendered else ""
    return note(why, strong="This picture has no scores.") if why else ""


def _points(shot: Shot, name: str) -> list[tuple[float, float]]:
    count = len(shot.alignment)
    stride = shot.step / count if count else 1
    return [((index + 1) * stride, step[name]) for index, step in enumerate(shot.alignment) if name in step]


def _colour(number: int) -> str:
    return SERIES[number % len(SERIES)]


# -- scores ------------------------------------------------------------------------------------------------------


def _table(shots: list[Shot]) -> str:
    labels = shots[0].rendered.labels if shots[0].rendered else {}
    subjects = [s.name for s in shots[0].order.subjects]
    heads = "".join(f'<th scope="col">{escape(shot.title)}</th>' for shot in shots)
    rows = [_group(f"alignment ({labels.get('alignment', 'scorer')})", len(shots))]
    named = enumerate(["prompt", *subjects], start=-1)
    rows += [_row(name, number, [_alignment(shot, name) for shot in shots]) for number, name in named]
    identity = [_row(name, number, [_identity(shot, name) for shot in shots]) for number, name in enumerate(subjects)]
    if any(identity):
        rows += [_group(f"identity ({labels.get('identity', 'scorer')})", len(shots)), *identity]
    unseen = [subject.name for subject in shots[0].order.subjects if not subject.views]
    hint = ""
    if unseen:
        words = f"No identity for {' and '.join(unseen)}: add pictures in the library."
        hint = f'<p class="muted hint">{escape(words)}</p>'
    return f'<table class="scores"><thead><tr><th></th>{heads}</tr></thead><tbody>{"".join(rows)}</tbody></table>{hint}'


def _group(words: str, columns: int) -> str:
    return f'<tr class="group"><th scope="rowgroup" colspan="{columns + 1}">{escape(words)}</th></tr>'


def _row(name: str, number: int, values: list[float | None]) -> str:
    known = [value for value in values if value is not None]
    if not known:
        return ""
    differ = len({f"{value:.3f}" for value in known}) > 1
    best = max(known) if differ else None
    dot = f'<i class="dot" style="background:{INK if number < 0 else _colour(number)}"></i>'
    cells = "".join(_number(value, best) for value in values)
    return f'<tr><th scope="row"><span class="who">{dot}{escape(name)}</span></th>{cells}</tr>'


def _number(value: float | None, best: float | None) -> str:
    if value is None:
        return "<td>–</td>"
    return f'<td class="{"best" if value == best else ""}">{value:.3f}</td>'


def _alignment(shot: Shot, name: str) -> float | None:
    """The mean over the shot's pictures."""
    found = [each[name] for each in (shot.rendered.alignment if shot.rendered else []) if name in each]
    return fmean(found) if found else None


def _identity(shot: Shot, name: str) -> float | None:
    """The mean over the shot's pictures; nothing for a subject that was left out."""
    found = [each[name].score for each in (shot.rendered.identity if shot.rendered else []) if name in each]
    return fmean(found) if found else None


def _parameters(shots: list[Shot]) -> str:
    texts = [json.dumps(_shown(shot), indent=2, ensure_ascii=False) for shot in shots]
    heads = [f"// {shot.title}\n" if len(shots) > 1 else "" for shot in shots]
    body = "\n\n".join(head + text for head, text in zip(heads, texts, strict=True))
    return f"<details><summary>Parameters, also inside the PNG</summary><pre>{escape(body)}</pre></details>"


def _shown(shot: Shot) -> Any:
    parameters = shot.rendered.parameters if shot.rendered else []
    return parameters[0] if len(parameters) == 1 else parameters


def _ending(session: Session) -> str:
    states = {shot.state for shot in session.shots}
    if states == {"done"}:
        views = any(each for shot in session.shots if shot.rendered for each in shot.rendered.identity)
        return "Done. Point at or tap a picture to see where each subject was found." if views else "Done."
    return "Stopped." if "cancelled" in states else "Not everything could be made."
