"""Scores: alignment of picture and prompt, identity of subjects, joint success. Models apart from arithmetic."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mole_diffusion.scoring.alignment import AlignmentScorer, load_alignment
    from mole_diffusion.scoring.identity import CentredIdentity, ClipIdentity, EfficientNetIdentity, IdentityScorer
    from mole_diffusion.scoring.intervals import Calibration, Interval, bootstrap_interval, calibrate_threshold
    from mole_diffusion.scoring.place import embed_places, overlap, place_scores, subject_score, windows
    from mole_diffusion.scoring.report import SceneReport, find_subjects, leak_matrix, report_scenes
    from mole_diffusion.scoring.views import Gallery, load_views

__all__ = [
    "AlignmentScorer",
    "Calibration",
    "CentredIdentity",
    "ClipIdentity",
    "EfficientNetIdentity",
    "Gallery",
    "IdentityScorer",
    "Interval",
    "SceneReport",
    "bootstrap_interval",
    "calibrate_threshold",
    "embed_places",
    "find_subjects",
    "leak_matrix",
    "load_alignment",
    "load_views",
    "overlap",
    "place_scores",
    "report_scenes",
    "subject_score",
    "windows",
]

_HOME = {
    "alignment": ("AlignmentScorer", "load_alignment"),
    "identity": ("CentredIdentity", "ClipIdentity", "EfficientNetIdentity", "IdentityScorer"),
    "intervals": ("Calibration", "Interval", "bootstrap_interval", "calibrate_threshold"),
    "place": ("embed_places", "overlap", "place_scores", "subject_score", "windows"),
    "report": ("SceneReport", "find_subjects", "leak_matrix", "report_scenes"),
    "views": ("Gallery", "load_views"),
}


def __getattr__(name: str) -> Any:
    """Each name is imported when it is first used."""
    for module, names in _HOME.items():
        if name in names:
            return getattr(import_module(f"{__name__}.{module}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
