"""What a terminal shows of samples, and how signals end a training."""

from __future__ import annotations

import os
import signal

import pytest

from training.cli.terminal import TerminalSink, _stop_on_signals
from training.control import Commands
from training.events import Sample


def test_samples_come_with_their_scores_and_scorers(capsys: pytest.CaptureFixture[str]) -> None:
    sink = TerminalSink()
    scorers = ("demo CLIP", "EfficientNet-Lite0")
    sink.emit(Sample("a.png", 5, {"prompt": 0.301, "robot": 0.2851}, "a robot", {"robot": 0.7}, scorers))
    sink.emit(Sample("b.png", 5, identity={"robot": 0.5}, scorers=scorers[1:]))
    sink.emit(Sample("c.png", 5))
    assert capsys.readouterr().err.splitlines() == [
        "Step 5: a.png (alignment: prompt 0.301, robot 0.285; identity: robot 0.700; by demo CLIP, EfficientNet-Lite0)",
        "Step 5: b.png (identity: robot 0.500; by EfficientNet-Lite0)",
        "Step 5: c.png",
    ]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_stop_after_the_step_that_is_under_way(number: signal.Signals) -> None:
    control, before = Commands(), signal.getsignal(number)
    with _stop_on_signals(control):
        os.kill(os.getpid(), number)
        assert control.should_stop()
    assert signal.getsignal(number) is before
