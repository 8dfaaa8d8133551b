"""Curves for TensorBoard or Weights & Biases, through accelerate's trackers."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from mole_diffusion.errors import InvalidRequest
from training.events import Event, Failed, Finished, Progress, Sample

Tracker = Literal["tensorboard", "wandb"]
PROJECT = "mole-diffusion"
_TITLES: Mapping[str, str] = {"tensorboard": "TensorBoard", "wandb": "Weights & Biases"}


class TrackerSink:
    """Forwards the loss and metrics of every step, and the scores of sample pictures."""

    def __init__(self, tracker: Any) -> None:
        """``tracker`` is a started ``accelerate.tracking.GeneralTracker``."""
        self._tracker: Any = tracker

    def emit(self, event: Event) -> None:
        """Note one event; the end of the run closes the tracker."""
        if isinstance(event, Progress):
            self._tracker.log({"loss": event.loss, **event.metrics}, step=event.step)
        elif isinstance(event, Sample):
            named = {"alignment": event.scores, "identity": event.identity}
            values = {f"{kind}/{name}": value for kind, scores in named.items() for name, value in scores.items()}
            if values:
                self._tracker.log(values, step=event.step)
        elif isinstance(event, Finished | Failed):
            self.close()

    def close(self) -> None:
        """Write out what is left; nothing may come after."""
        if self._tracker is not None:
            self._tracker.finish()
            self._tracker = None


def open_tracker(kind: Tracker, name: str, folder: Path) -> TrackerSink:
    """Start a tracker of the run ``name`` whose files lie in ``folder``.

    Weights & Biases takes account and mode from its own settings (WANDB_API_KEY, WANDB_MODE).
    Raises InvalidRequest where its package is not installed.
    """
    from accelerate.state import PartialState
    from accelerate.tracking import TensorBoardTracker, WandBTracker
    from accelerate.utils import is_tensorboard_available, is_wandb_available

    installed = is_tensorboard_available() if kind == "tensorboard" else is_wandb_available()
    if not installed:
        raise InvalidRequest(f"{_TITLES[kind]} is not installed: pip install {kind}, or leave it out.")
    PartialState()  # trackers ask it which process they are in
    folder.mkdir(parents=True, exist_ok=True)
    tracker: Any
    if kind == "tensorboard":
        tracker = TensorBoardTracker(name, folder)
    else:
        tracker = WandBTracker(PROJECT, name=name, dir=str(folder))
    tracker.start()
    return TrackerSink(tracker)
