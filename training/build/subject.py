"""``subject``: pictures to a task that trains an expert."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from training.build.base import load_base
from training.data.subjects import load_subject

if TYPE_CHECKING:
    from training.tasks.subject import SubjectConfig, SubjectTask


def build_subject(config: SubjectConfig, images: Path) -> SubjectTask:
    """Read the pictures, load the base, attach the adapter."""
    from training.tasks.subject import SubjectTask

    subject = load_subject(config.name or config.token, config.phrase, images)
    base, pipe = load_base(config.base, config.precision)
    return SubjectTask(config, base, pipe, subject)
