"""The job store: allowed transitions only, claims by one, flags, events, several processes at once."""

from __future__ import annotations

import sqlite3
import threading
from itertools import product
from pathlib import Path

import pytest

from mole_diffusion.errors import InvalidRequest
from training.jobs.states import STATES, TERMINAL, TRANSITIONS, State
from training.jobs.store import JobStore, job_folder

PATHS: dict[State, list[State]] = {
    "queued": [],
    "running": ["running"],
    "finished": ["running", "finished"],
    "failed": ["running", "failed"],
    "cancelled": ["cancelled"],
}


@pytest.fixture
def store(tmp_path: Path) -> JobStore:
    return JobStore.of(tmp_path)


@pytest.mark.parametrize(("source", "target"), list(product(STATES, STATES)))
def test_transitions(store: JobStore, source: State, target: State) -> None:
    job = store.create("gate", {"steps": 3})
    for state in PATHS[source]:
        store.set_state(job, state)
    if target in TRANSITIONS[source]:
        store.set_state(job, target)
        assert store.get(job).state == target
    else:
        with pytest.raises(InvalidRequest, match=f"{source} cannot become {target}"):
            store.set_state(job, target)
        assert store.get(job).state == source


def test_terminal_states_are_the_three_ends() -> None:
    assert {"finished", "failed", "cancelled"} == TERMINAL


def test_queue_is_first_in_first_out(store: JobStore) -> None:
    ids = [store.create("gate", {"steps": n}, title=str(n)) for n in range(3)]
    claimed = [store.claim() for _ in range(4)]
    assert [job.id for job in claimed if job] == ids and claimed[3] is None
    assert claimed[0] is not None and claimed[0].state == "running" and claimed[0].attempts == 1


def test_a_job_is_claimed_once_by_many(store: JobStore) -> None:
    ids = {store.create("gate", {}) for _ in range(20)}
    claimed: list[str] = []

    def work() -> None:
        other = JobStore(store.url)
        while (job := other.claim()) is not None:
            claimed.append(job.id)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(claimed) == 20 and set(claimed) == ids


def test_cancel_of_queued_running_and_ended(store: JobStore) -> None:
    queued, running, ended = (store.create("gate", {}) for _ in range(3))
    for job in (running, ended):
        store.set_state(job, "running")
    store.set_state(ended, "finished")
    for job in (queued, running, ended):
        store.request_cancel(job)
    assert [store.get(job).state for job in (queued, running, ended)] == ["cancelled", "running", "finished"]
    assert store.flags(running) == (True, False, False)


def test_flags_are_taken_once(store: JobStore) -> None:
    job = store.create("gate", {})
    store.request_save(job)
    store.request_sample(job)
    assert store.flags(job) == (False, True, True)
    assert [store.take_flag(job, "save"), store.take_flag(job, "save")] == [True, False]
    assert store.take_flag(job, "sample")


def test_events_come_in_order_and_by_type(store: JobStore) -> None:
    job, other = store.create("gate", {}), store.create("gate", {})
    store.progress(job, 1, 9, 0.5, {"balance": 0.1})
    store.record(other, "log", {"text": "not mine"})
    store.record(job, "sample", {"path": "a.png"}, step=1)
    store.progress(job, 2, 9, 0.4, {})
    steps = store.events(job, types=["progress"])
    assert [(event.step, event.data["loss"]) for event in steps] == [(1, 0.5), (2, 0.4)]
    assert [event.type for event in store.events(job, after=steps[0].number)] == ["sample", "progress"]
    now = store.get(job)
    assert (now.step, now.total, now.loss) == (2, 9, 0.4) and now.heartbeat is not None


def test_lists_by_owner_and_state(store: JobStore) -> None:
    mine = store.create("gate", {}, owner="me")
    store.create("subject", {}, owner="you")
    assert [job.id for job in store.list(owner="me")] == [mine]
    assert [job.owner for job in store.list(kind="subject")] == ["you"]
    assert store.list(["running"]) == []


def test_only_ended_jobs_are_deleted(store: JobStore) -> None:
    job = store.create("gate", {})
    with pytest.raises(InvalidRequest, match="cancel it"):
        store.delete(job)
    store.request_cancel(job)
    store.delete(job)
    assert store.list() == [] and store.events(job) == []


@pytest.mark.parametrize("name", ["../../etc", "0" * 31, "0" * 33, "A" * 32, "0" * 31 + "/", "", "0" * 32 + "\n"])
def test_ids_cannot_leave_the_folder(store: JobStore, tmp_path: Path, name: str) -> None:
    for use in (store.get, store.request_cancel, lambda text: job_folder(tmp_path, text)):
        with pytest.raises(InvalidRequest, match="hexadecimal"):
            use(name)


def test_unknown_job_is_named(store: JobStore) -> None:
    for use in (store.get, store.heartbeat, store.request_save):
        with pytest.raises(InvalidRequest, match="no job"):
            use("0" * 32)


def test_database_is_in_wal_mode_and_reopens(store: JobStore, tmp_path: Path) -> None:
    job = store.create("gate", {"steps": 5, "experts": [{"name": "a"}]})
    store.close()
    with sqlite3.connect(tmp_path / "library.db") as raw:
        assert raw.execute("PRAGMA journal_mode").fetchone()[0] == "wal"
    assert JobStore.of(tmp_path).get(job).config == {"steps": 5, "experts": [{"name": "a"}]}
