"""Around the queue: limits, what is removed when, calling a store again that was away, and the commands."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path

import pytest
from sqlalchemy import exc

from mole_diffusion.errors import InvalidRequest
from tests.training.test_jobs_worker import command
from training.__main__ import main as run_command
from training.cli import jobs as commands
from training.cli import worker as worker_command
from training.errors import TrainingFailed
from training.jobs import executor
from training.jobs.errors import StoreUnavailable
from training.jobs.limits import DiskGuard, Limits, size_of
from training.jobs.reasons import died, is_lost_peer, sentence
from training.jobs.retention import DAY, Pruned, Retention, prune
from training.jobs.retry import persist
from training.jobs.states import State
from training.jobs.store import JobStore, job_folder


@pytest.fixture
def store(tmp_path: Path) -> JobStore:
    return JobStore.of(tmp_path)


# -- limits --------------------------------------------------------------------------------------------------------


def test_limits_come_from_the_environment_and_go_back() -> None:
    told = {"MOLE_MAX_JOBS": "3", "MOLE_MAX_DISK_MB": "500", "MOLE_MIN_FREE_MB": "0", "PATH": "/bin"}
    limits = Limits.of(told)
    assert limits == Limits(jobs_per_owner=3, disk_mb_per_owner=500, free_mb=0)
    assert Limits.of(limits.variables()) == limits and Limits.of({}) == Limits() and Limits.of({"MOLE_MAX_JOBS": " "})


@pytest.mark.parametrize(
    ("told", "words"),
    [
        ({"MOLE_MAX_JOBS": "many"}, "MOLE_MAX_JOBS is a whole number, not 'many'"),
        ({"MOLE_MAX_JOBS": "0"}, "at least one job"),
        ({"MOLE_MIN_FREE_MB": "-1"}, "whole number"),
    ],
)
def test_limits_that_are_none_are_refused(told: dict[str, str], words: str) -> None:
    with pytest.raises(InvalidRequest, match=words):
        Limits.of(told)


def test_the_disk_is_measured_over_all_jobs_of_an_owner(tmp_path: Path) -> None:
    mine, other = tmp_path / "mine", tmp_path / "other"
    for folder, size in ((mine, 400_000), (other, 700_000)):
        (folder / "deep").mkdir(parents=True)
        (folder / "deep" / "file").write_bytes(b"x" * size)
    assert size_of(other) == 700_000 and size_of(tmp_path / "missing") == 0
    DiskGuard(Limits(disk_mb_per_owner=1, free_mb=0), mine, []).check()
    DiskGuard(Limits(disk_mb_per_owner=2, free_mb=0), mine, [other]).check()
    with pytest.raises(TrainingFailed, match=r"hold 1\.0 MB on the disk and may hold 1\.0 MB"):
        DiskGuard(Limits(disk_mb_per_owner=1, free_mb=0), mine, [other]).check()
    with pytest.raises(TrainingFailed, match="must stay free"):
        DiskGuard(Limits(free_mb=2**40), mine, []).check()


# -- what is removed -----------------------------------------------------------------------------------------------


def old_job(store: JobStore, data: Path, state: State, days: float = 0.0, owner: str | None = None) -> str:
    """A job with files that ended some days ago."""
    job = store.create("subject", {}, owner=owner)
    if state != "queued":
        store.set_state(job, "running")
    if state not in ("queued", "running"):
        store.set_state(job, state, result={"path": f"jobs/{job}/result.safetensors"} if state == "finished" else None)
        store._update(job, ended=(store.get(job).ended or store.get(job).created) - days * DAY)
    store.record(job, "log", {"text": "a line"})
    folder = job_folder(data, job)
    for name in ("checkpoints/step-00000001/state.safetensors", "samples/1.png", "log.txt", "config.json"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("content")
    if state == "finished":
        (folder / "result.safetensors").write_text("an expert")
    return job


def names(data: Path, job: str) -> set[str]:
    folder = job_folder(data, job)
    return {path.name for path in folder.iterdir()} if folder.is_dir() else set()


ALL = {"checkpoints", "samples", "log.txt", "config.json"}


def test_only_checkpoints_of_finished_jobs_go_at_once(store: JobStore, tmp_path: Path) -> None:
    states: tuple[State, ...] = ("queued", "running", "paused", "failed", "cancelled", "finished")
    made = {state: old_job(store, tmp_path, state, 100) for state in reversed(states)}
    assert prune(store, tmp_path) == Pruned(jobs=1, bytes=7)
    assert {state: names(tmp_path, job) for state, job in made.items()} == {
        **dict.fromkeys(states, ALL),
        "finished": ALL - {"checkpoints"} | {"result.safetensors"},
    }
    assert prune(store, tmp_path) == Pruned()


def test_old_jobs_keep_their_result_and_their_place_in_the_list(store: JobStore, tmp_path: Path) -> None:
    waiting: list[State] = ["queued", "running", "paused"]
    ended: list[State] = ["finished", "failed", "cancelled"]
    kept = [old_job(store, tmp_path, state, 100) for state in waiting]
    old = {state: old_job(store, tmp_path, state, 8) for state in ended}
    young = old_job(store, tmp_path, "failed", 6)
    prune(store, tmp_path, Retention(days=7))
    assert {state: names(tmp_path, job) for state, job in old.items()} == {
        "finished": {"result.safetensors"},
        "failed": set(),
        "cancelled": set(),
    }
    assert names(tmp_path, young) == ALL and [names(tmp_path, job) for job in kept] == [ALL] * 3
    assert store.get(old["finished"]).result is not None
    assert [event.type for event in store.events(old["failed"])] == ["state"] * 3
    assert not list((tmp_path / "jobs").glob(".removed-*"))


def test_each_owner_keeps_the_newest(store: JobStore, tmp_path: Path) -> None:
    mine = [old_job(store, tmp_path, "failed", owner="me") for _ in range(3)]
    yours = old_job(store, tmp_path, "failed", owner="you")
    assert prune(store, tmp_path, Retention(per_owner=2)).jobs == 1
    assert [bool(names(tmp_path, job)) for job in (*mine, yours)] == [False, True, True, True]


def test_a_job_that_was_started_again_meanwhile_keeps_its_files(
    store: JobStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = old_job(store, tmp_path, "failed", 9)
    listed = store.list
    monkeypatch.setattr(store, "list", lambda *given, **options: [listed(*given, **options), store.retry(job)][0])
    assert prune(store, tmp_path, Retention(days=1)).jobs == 0
    assert names(tmp_path, job) == ALL


def test_what_a_killed_round_left_is_removed(store: JobStore, tmp_path: Path) -> None:
    (tmp_path / "jobs" / ".removed-x" / "checkpoints").mkdir(parents=True)
    prune(store, tmp_path)
    assert list((tmp_path / "jobs").iterdir()) == []


# -- calling again -------------------------------------------------------------------------------------------------


def locked() -> exc.OperationalError:
    return exc.OperationalError("UPDATE jobs", {}, Exception("database is locked"))


def test_calls_are_repeated_with_growing_waits_until_time_is_up() -> None:
    waits: list[float] = []
    answers = [locked(), locked(), "done"]

    def action() -> str:
        answer = answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer

    assert persist(action, 10, wait=waits.append, clock=lambda: sum(waits)) == "done"
    assert waits == [0.05, 0.1]

    def never() -> None:
        raise locked()

    waits.clear()
    with pytest.raises(StoreUnavailable, match=r"away for 7 seconds \(database is locked\)"):
        persist(never, 7, wait=waits.append, clock=lambda: sum(waits))
    assert waits == [0.05, 0.1, 0.2, 0.4, 0.8, 1.6, 2.0, 2.0]


@pytest.mark.parametrize("error", [InvalidRequest("No."), exc.IntegrityError("INSERT", {}, Exception("twice"))])
def test_what_time_does_not_heal_is_not_repeated(error: Exception) -> None:
    calls = []

    def action() -> None:
        calls.append(1)
        raise error

    with pytest.raises(type(error)):
        persist(action, 10)
    assert len(calls) == 1


def test_reasons_name_what_to_change() -> None:
    config = {"base": "sdxl", "batch": 4, "resolution": 1024, "token": "zwx"}
    lower = "(base sdxl, batch 4, resolution 1024). Lower the batch or the resolution, or choose a preset"
    assert lower in sentence(RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"), config)
    assert lower in died(config, "Killed") and died(config, "Killed").endswith("Its last words: Killed")
    assert "The disk is full" in sentence(OSError(28, "No space left on device"), config)
    assert sentence(InvalidRequest("No."), config) == "No."
    assert sentence(KeyError("x"), config) == "Training stopped with KeyError: 'x'"


# -- commands ------------------------------------------------------------------------------------------------------


@pytest.fixture
def say(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """What ``jobs`` prints for some words."""
    parser = argparse.ArgumentParser()
    commands.add_arguments(parser)

    def run(*words: str) -> str:
        assert commands.main(parser.parse_args([*words, "--data-dir", str(tmp_path)])) == 0
        return capsys.readouterr().out

    return run


def test_jobs_are_listed_shown_and_moved(store: JobStore, say: Callable[..., str]) -> None:
    assert say("list") == "There are no jobs.\n"
    job = store.create("gate", {"steps": 9}, title="robot + bunny")
    assert job in say("list") and "robot + bunny" in say("list", "--state", "queued")
    assert json.loads(say("list", "--state", "running", "--json")) == []
    assert json.loads(say("show", job, "--json"))["total"] == 9
    say("priority", job, "5")
    assert store.get(job).priority == 5
    for words, reason in ((("list", "--state", "lost"), "one of queued"), (("show", "0" * 32), "There is no job")):
        with pytest.raises(InvalidRequest, match=reason):
            say(*words)


def test_jobs_are_asked_from_the_command_line(store: JobStore, say: Callable[..., str], tmp_path: Path) -> None:
    job = store.create("gate", {})
    with pytest.raises(InvalidRequest, match="only a running job"):
        say("pause", job)
    store.claim()
    say("save", job)
    say("sample", job)
    assert "asked to pause" in say("pause", job)
    assert store.requests(job) == (False, True, True, True)
    store.set_state(job, "paused")
    assert json.loads(say("resume", job, "--json"))["state"] == "queued"
    store.claim()
    store.set_state(job, "failed", reason="It broke.")
    assert "It broke." in say("show", job)
    assert json.loads(say("retry", job, "--json"))["state"] == "queued"
    assert "cancelled" in say("cancel", job)
    (job_folder(tmp_path, job) / "checkpoints").mkdir(parents=True)
    assert json.loads(say("prune", "--json")) == {"jobs": 0, "bytes": 0}
    assert say("prune", "--keep-days", "0") == "Removed 0.0 MB of 1 job.\n" and not job_folder(tmp_path, job).exists()


def test_the_worker_command_serves_once(
    store: JobStore, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(executor.LocalExecutor.__init__, "__defaults__", (command, None, None, None))
    job = store.create("gate", {"steps": 2})
    parser = argparse.ArgumentParser()
    worker_command.add_arguments(parser)
    words = ["--data-dir", str(tmp_path), "--device", "cpu:1", "--once", "--json"]
    assert worker_command.main(parser.parse_args(words)) == 0
    said = capsys.readouterr()
    assert json.loads(said.out)["ended"] == {"finished": 1} and "/cpu:1 with sqlite:///" in said.err
    assert store.get(job).state == "finished" and "cpu:1" in (store.get(job).worker or "")


def test_a_lost_process_of_several_is_the_worker_s_to_settle() -> None:
    said = "[pair.cc:545] Read error [127.0.0.1]:4242: Connection reset by peer"
    assert is_lost_peer(RuntimeError(said)) and not is_lost_peer(RuntimeError("shapes differ"))


def test_jobs_are_deleted_with_their_files(store: JobStore, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    job = store.create("gate", {"steps": 1})
    job_folder(tmp_path, job).mkdir(parents=True)
    main = ["jobs", "delete", job, "--data-dir", str(tmp_path)]
    assert run_command(main) == 2 and "cancel it before" in capsys.readouterr().err
    store.request_cancel(job)
    assert run_command(main) == 0 and not job_folder(tmp_path, job).exists() and store.list() == []


def test_retention_comes_from_the_environment() -> None:
    assert Retention.of({"MOLE_KEEP_DAYS": "7"}) == Retention(7, None) and Retention.of({}) == Retention()
