"""The kill tests' own harness: it finds what is planted, and finds nothing where nothing is wrong."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from safetensors.numpy import save_file

from tests.chaos import counting, invariants, processes
from tests.chaos.__main__ import main
from tests.chaos.campaign import Campaign
from tests.chaos.findings import Findings, JobReport, summary, unequal_results
from tests.chaos.invariants import Attempt, attempts
from training.jobs.store import JobEvent


def events(*found: tuple[str, int | None, dict[str, Any]]) -> list[JobEvent]:
    return [JobEvent(number, "0" * 32, 0.0, kind, step, data) for number, (kind, step, data) in enumerate(found, 1)]


RUNNING = ("state", None, {"state": "running"})


def test_lost_steps_are_read_from_a_job_s_events() -> None:
    steps = [("progress", step, {"loss": 1.0}) for step in (1, 2, 3, 4)]
    told = ("log", None, {"text": "Resumed after step 2."})
    tries = attempts(events(RUNNING, *steps, ("saved", 2, {}), RUNNING, RUNNING, told, *steps[2:]))
    assert tries == [Attempt(None, [1, 2, 3, 4], [2]), Attempt(), Attempt(2, [3, 4])]
    assert [attempt.resumed for attempt in tries] == [0, None, 2]
    assert invariants.losses(tries) == [2]
    assert invariants.lost_work(tries, 2) == []
    assert invariants.lost_work(tries, 1) == ["2 steps lost, 1 allowed"]
    assert invariants.losses([Attempt(None, [1, 2]), Attempt(2)]) == [0]


def test_steps_out_of_order_show_two_processes() -> None:
    assert invariants.disorder([Attempt(2, [3, 5]), Attempt(4, [5])]) == []
    assert invariants.disorder([Attempt(None, [1, 2, 2, 3])]) == ["start 1 reported step 2 after step 2"]
    assert invariants.disorder([Attempt(2, [2])]) == ["start 1 reported step 2 after step 2"]


def test_half_files_and_leftovers_are_found(tmp_path: Path) -> None:
    import numpy

    job = tmp_path / "jobs" / "one"
    for name in ("checkpoints/step-1", "checkpoints/damaged-step-0", "checkpoints/.writing-7"):
        (job / name).mkdir(parents=True)
        save_file({"x": numpy.ones(4)}, job / name / "state.safetensors")
        (job / name / "state.json").write_text("{}")
    Image.new("RGB", (8, 8)).save(job / "sample.png")
    assert list(invariants.half_files(tmp_path)) == []
    for name in ("step-1", "damaged-step-0", ".writing-7"):
        file = job / "checkpoints" / name / "state.safetensors"
        file.write_bytes(file.read_bytes()[:-3])
    (job / "config.json").write_text('{"steps"')
    (job / "sample.png").write_bytes((job / "sample.png").read_bytes()[:40])
    found = [sentence.partition(" is not whole")[0] for sentence in invariants.half_files(tmp_path)]
    assert found == ["jobs/one/checkpoints/step-1/state.safetensors", "jobs/one/config.json", "jobs/one/sample.png"]
    (job / ".result.part").touch()
    assert invariants.leftovers(tmp_path) == (["jobs/one/checkpoints/.writing-7"], ["jobs/one/.result.part"])


def test_content_is_the_same_whatever_the_order_of_metadata(tmp_path: Path) -> None:
    import numpy

    tensor = numpy.arange(4.0)
    facts = [{str(number): "x" for number in order} for order in (range(20), reversed(range(20)))]
    for name, values, metadata in (("a", tensor, facts[0]), ("b", tensor, facts[1]), ("c", tensor + 1, facts[0])):
        save_file({"x": values}, tmp_path / f"{name}.safetensors", metadata=metadata)
    a, b, c = (invariants.content(tmp_path / f"{name}.safetensors") for name in "abc")
    assert a == b != c


def test_orphan_is_found_and_ended(tmp_path: Path) -> None:
    mark = f"{tmp_path}-{os.getpid()}"
    child = processes.start(["-c", "import time; time.sleep(60)"], mark, tmp_path / "log.txt")
    assert processes.orphans(f"{mark}0", 0) == []
    (sentence,) = processes.orphans(mark, 0.1)
    assert sentence == f"process {child.pid} is left: {sys.executable} -c import time; time.sleep(60)"
    assert child.wait(10) == -9 and processes.marked(mark) == []


def test_results_are_compared_with_the_job_left_alone() -> None:
    alone = JobReport("a", "gate", "finished", 1, 0, (), "x")
    same = JobReport("b", "gate", "finished", 3, 2, (1, 2), "x")
    other = JobReport("c", "gate", "finished", 2, 1, (1,), "y")
    unknown = JobReport("d", "subject", "finished", 2, 1, (1,), "z")
    assert unequal_results([Findings(jobs=[alone, same])]) == []
    (one, two) = unequal_results([Findings(jobs=[other, unknown]), Findings(jobs=[alone])])
    assert "gate job c" in one and "differs" in one and "subject job d" in two


def campaign(folder: Path, kills: int, **faults: object) -> dict[str, Any]:
    run = Campaign(folder, counting.recipes(**faults), seed=1, command=counting.COMMAND)
    return run.run(["alone", "kills"], kills, 120)


def test_kills_of_jobs_that_count(tmp_path: Path) -> None:
    result = campaign(tmp_path, 2)
    assert result["violations"] == [], summary(result)
    assert result["kills"]["done"] == 2 == sum(result["kills"]["by_phase"].values())
    assert result["jobs"]["by_state"].keys() <= {"finished", "failed"} and result["max_lost"] <= counting.SAVE_EVERY
    assert json.loads(json.dumps(result))["kills"] == result["kills"] and "2 kills (2 asked for)" in summary(result)


def test_planted_loss_and_orphan_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tests.chaos.scenarios.kills.TARGETS", {"child": 1})
    monkeypatch.setattr("tests.chaos.scenarios.kills.MOMENTS", {"step": 1})
    monkeypatch.setattr("tests.chaos.arena.ORPHAN_GRACE", 0.2)
    result = campaign(tmp_path, 1, forgets=4, leaves=60)
    assert any("steps lost, 2 allowed" in sentence for sentence in result["violations"]), summary(result)
    assert any(sentence.startswith("kills: process ") for sentence in result["violations"]), summary(result)


def test_wrong_numbers_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    for words in (["--kills", "-1"], ["--minutes", "0"], ["--only", "earthquake"]):
        with pytest.raises(SystemExit) as error:
            main(words)
        assert error.value.code == 2
    assert "earthquake" in capsys.readouterr().err
