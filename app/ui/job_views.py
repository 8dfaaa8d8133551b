"""Jobs as HTML: the list, and the chosen one with its progress, curve, pictures and log."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from app.jobs import JobSample, JobView, duration
from app.pictures import thumbnail_uri
from app.ui.charts import Series, line_chart, smooth, thin
from app.ui.parts import block, chip, note

if TYPE_CHECKING:
    from training.jobs.store import Job

__all__ = ["curve", "head", "job_list", "log_html", "samples"]

STATES = {
    "queued": ("waiting", ""),
    "running": ("training", "live"),
    "finished": ("finished", "good"),
    "paused": ("paused", ""),
    "failed": ("failed", "bad"),
    "cancelled": ("cancelled", ""),
}


def job_list(jobs: Sequence[Job], chosen: str) -> str:
    """Every job as a card that can be clicked."""
    return block(f'<div class="jobs">{"".join(_card(job, job.id == chosen) for job in jobs)}</div>')


def head(view: JobView) -> str:
    """What the chosen job is doing, in a sentence."""
    job = view.job
    if job.state == "failed":
        return block(note(job.reason or "The job ended without a reason.", "bad", "Not finished."))
    return block(f'<div class="status num" role="status">{escape(_sentence(view))}</div>')


def curve(view: JobView) -> str:
    """The loss by step: faint as it came, bold as its moving average, and on held-out scenes."""
    if len(view.losses) < 2:
        return ""
    points = thin([(float(step), loss) for step, loss in view.losses])
    lines = [Series("each step", "var(--border-color-accent)", points), Series("loss", "var(--s1)", smooth(points))]
    if len(view.held_out) > 1:
        held_out = thin([(float(step), loss) for step, loss in view.held_out])
        lines.append(Series("on scenes it never trained on", "var(--s2)", held_out))
    total = max(view.job.total, int(points[-1][0]))
    ends = {"x_end": total, "x_words": ("step 1", f"step {total:,}")}
    chart = line_chart(lines, **ends, height=150, label="Loss by step")
    return block(f'<p class="section">Loss</p>{chart}{_scores(view, ends)}')


def _scores(view: JobView, ends: dict[str, Any]) -> str:
    """What decides which gates are kept, where pictures do: by a model that did not train them."""
    if len(view.scores) < 2:
        return ""
    points = thin([(float(step), score) for step, score in view.scores])
    chart = line_chart([Series("score", "var(--s2)", points)], **ends, height=110, label="Score by step")
    return f'<p class="section">Score of validation pictures: identity × what was asked for</p>{chart}'


def samples(view: JobView) -> str:
    """Pictures made with the gates as they were, newest first."""
    if not view.samples:
        return ""
    newest = sorted(view.samples, key=lambda sample: sample.step, reverse=True)[:12]
    scorers = ", ".join(dict.fromkeys(scorer for sample in newest for scorer in sample.scorers))
    words = f"Pictures along the way{', ' if scorers else ''}{scorers}"
    figures = "".join(map(_sample, newest))
    return block(f'<p class="section">{escape(words)}</p><div class="samples">{figures}</div>')


def log_html(view: JobView) -> str:
    """The end of the log."""
    return block(f"<pre>{escape(view.log)}</pre>") if view.log else ""


def _card(job: Job, on: bool) -> str:
    words, kind = STATES[job.state]
    part = 100 if job.state == "finished" else 100 * job.step / max(job.total, 1)
    tone = {"finished": "good", "failed": "bad"}.get(job.state, "")
    return (
        f'<button class="job{" on" if on else ""}" data-id="{job.id}"><span class="top">'
        f"<strong>{escape(job.title)}</strong>{chip(words, kind)}</span>"
        f'<span class="meter {tone}" style="--p:{part:.1f}%"><i></i></span></button>'
    )


def _sentence(view: JobView) -> str:
    job = view.job
    if job.state == "queued":
        return "Waits for its turn; it starts by itself."
    if job.state == "finished":
        took = f" in {duration(job.ended - job.started)}" if job.ended and job.started else ""
        ready = "The subject is in the library" if job.kind == "subject" else "The gates are ready to use"
        return f"{job.step:,} steps{took}. {ready}."
    if job.state in ("cancelled", "paused"):
        return f"{job.state.capitalize()} at step {job.step:,} of {job.total:,}; it can go on from there."
    if job.pause:
        return f"Pausing at step {job.step:,} of {job.total:,}."
    if job.cancel:
        return f"Stopping at step {job.step:,} of {job.total:,}."
    if not job.step:
        return "Preparing: loading the base and the subjects' pictures."
    left = f", about {duration(view.seconds_left)} left" if view.seconds_left is not None else ""
    loss = f", loss {job.loss:.3f}" if job.loss is not None else ""
    return f"Step {job.step:,} of {job.total:,}{loss}{left}. It goes on when this page is closed."


def _sample(sample: JobSample) -> str:
    words = [f"{name} {value:.2f}" for name, value in sample.scores.items()]
    words += [f"{name}, identity {value:.2f}" for name, value in sample.identity.items()]
    address = _thumbnail(sample.path, sample.path.stat().st_mtime_ns)
    lines = "".join(f"<br>{escape(line)}" for line in words)
    step = sample.step
    return f'<figure><img src="{address}" alt="Step {step}"><figcaption>step {step}{lines}</figcaption></figure>'


@lru_cache(maxsize=256)
def _thumbnail(path: Path, _modified: int) -> str:
    return thumbnail_uri(path, 256)
