"""The job store on SQLite and PostgreSQL: transitions, claims by one, requests, events, several processes at once."""

from __future__ import annotations

import multiprocessing
import sqlite3
import sys
import threading
from collections.abc import Iterator
from itertools import product
from pathlib import Path

import pytest
import sqlalchemy as sa

from mole_diffusion.errors import InvalidRequest
from tests.training.postgres import PASSWORD, new_schema, url  # noqa: F401 - fixtures
from training.jobs.database import make_engine, shown
from training.jobs.errors import JobLost, StoreUnavailable
from training.jobs.limits import Limits
from training.jobs.states import STATES, TERMINAL, TRANSITIONS, State
from training.jobs.store import JobStore, Requests, job_folder

PATHS: dict[State, list[State]] = {
    "queued": [],
    "running": ["running"],
    "paused": ["running", "paused"],
    "finished": ["running", "finished"],
    "failed": ["running", "failed"],
    "cancelled": ["cancelled"],
}


@pytest.fixture
def store(url: str) -> Iterator[JobStore]:  # noqa: F811
    store = JobStore(url)
    yield store
    store.close()


def test_transitions(store: JobStore) -> None:
    for source, target in product(STATES, STATES):
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


def test_queue_takes_the_highest_priority_then_the_oldest(store: JobStore) -> None:
    first, second, urgent, late = (store.create("gate", {}, priority=n) for n in (0, 0, 5, -1))
    moved = store.create("gate", {})
    store.set_priority(moved, 9)
    claimed = [store.claim("gpu1/cuda:0") for _ in range(6)]
    assert [job.id for job in claimed if job] == [moved, urgent, first, second, late] and claimed[5] is None
    job = claimed[0]
    assert job is not None and (job.state, job.attempts, job.starts) == ("running", 1, 1)
    assert job.worker == "gpu1/cuda:0"
    with pytest.raises(InvalidRequest, match="is running; only a queued job"):
        store.set_priority(moved, 1)
    with pytest.raises(InvalidRequest, match="priority is between"):
        store.create("gate", {}, priority=10_000)


def test_a_worker_of_one_device_leaves_jobs_of_two(store: JobStore) -> None:
    wide, narrow = store.create("gate", {"devices": 2}), store.create("gate", {})
    one, none, two = store.claim(devices=1), store.claim(devices=1), store.claim()
    assert one is not None and one.id == narrow and none is None
    assert two is not None and two.id == wide and two.devices == 2
    for devices in (0, 65, True, "2"):
        with pytest.raises(InvalidRequest, match="devices is"):
            store.create("gate", {"devices": devices})


def test_a_job_is_claimed_once_by_many(store: JobStore) -> None:
    ids = {store.create("gate", {}) for _ in range(20)}
    claimed: list[str] = []

    def work() -> None:
        other = JobStore(store.url)
        while (job := other.claim()) is not None:
            claimed.append(job.id)
        other.close()

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(claimed) == 20 and set(claimed) == ids


def test_cancel_of_queued_running_paused_and_ended(store: JobStore) -> None:
    queued, running, paused, ended = (store.create("gate", {}) for _ in range(4))
    for job in (running, paused, ended):
        store.set_state(job, "running")
    store.set_state(paused, "paused")
    store.set_state(ended, "finished")
    for job in (queued, running, paused, ended):
        store.request_cancel(job)
    states = [store.get(job).state for job in (queued, running, paused, ended)]
    assert states == ["cancelled", "running", "cancelled", "finished"]
    assert store.requests(running) == Requests(cancel=True, pause=False, save=False, sample=False)


def test_a_cancel_that_comes_while_a_job_pauses_is_not_lost(store: JobStore) -> None:
    job = store.create("gate", {"steps": 9})
    claimed = store.claim()
    store.request_pause(job)
    store.request_cancel(job)  # after the child has looked, before it says that it paused
    assert claimed is not None
    store.set_state(job, "paused", start=claimed.starts)
    assert store.get(job).state == "cancelled"


def test_requests_reach_running_jobs_only_and_are_taken_once(store: JobStore) -> None:
    job = store.create("gate", {})
    for ask, name in ((store.request_pause, "pause"), (store.request_save, "save"), (store.request_sample, "sample")):
        with pytest.raises(InvalidRequest, match=f"is queued; only a running job can be asked to {name}"):
            ask(job)
    store.claim()
    store.request_save(job)
    store.request_sample(job)
    assert store.requests(job) == Requests(cancel=False, pause=False, save=True, sample=True)
    assert [store.take(job, "save"), store.take(job, "save")] == [True, False]
    assert store.take(job, "sample")


def test_resume_and_retry_start_afresh_but_go_on(store: JobStore) -> None:
    paused, failed, cancelled = (store.create("gate", {}) for _ in range(3))
    for job, state in ((paused, "paused"), (failed, "failed"), (cancelled, "cancelled")):
        store.claim()
        store.request_pause(job)
        store.progress(job, 7, 9, 0.5, {})
        store.set_state(job, state, reason="It broke.")
    for again, job, words in ((store.retry, paused, "only a failed"), (store.resume, failed, "only a paused or")):
        with pytest.raises(InvalidRequest, match=words):
            again(job)
    store.resume(paused)
    store.retry(failed)
    store.resume(cancelled)
    for job in map(store.get, (paused, failed, cancelled)):
        assert (job.state, job.reason, job.ended, job.attempts, job.pause, job.step) == (
            "queued",
            None,
            None,
            0,
            False,
            7,
        )
    again = store.claim()
    assert again is not None and (again.id, again.starts) == (paused, 2)


def test_an_owner_has_so_many_unfinished_jobs_at_most(store: JobStore) -> None:
    limits = Limits(jobs_per_owner=2)
    first = store.create("gate", {}, owner="me", limits=limits)
    second = store.create("gate", {}, owner="me", limits=limits)
    store.claim()
    with pytest.raises(InvalidRequest, match="At most 2 jobs of yours"):
        store.create("gate", {}, owner="me", limits=limits)
    store.create("gate", {}, owner="you", limits=limits)
    assert len(store.list(owner="me")) == 2, "the refused one left nothing behind"
    store.set_state(first, "failed")
    third = store.create("gate", {}, owner="me", limits=limits)
    with pytest.raises(InvalidRequest, match="At most 2 jobs"):
        store.retry(first, limits=limits)
    assert store.get(first).state == "failed"
    for job in (second, third):
        store.request_cancel(job)
    store.retry(first, limits=limits)


def test_the_limit_holds_when_many_come_at_once(store: JobStore) -> None:
    def work() -> None:
        other = JobStore(store.url)
        for _ in range(3):
            try:
                other.create("gate", {}, owner="me", limits=Limits(jobs_per_owner=4))
            except InvalidRequest:
                continue
        other.close()

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(store.list(owner="me")) == 4


def test_a_start_writes_only_while_the_job_is_its_own(store: JobStore) -> None:
    job = store.create("gate", {})
    store.claim()
    store.progress(job, 1, 9, 0.5, {}, start=1)
    store.set_state(job, "queued", start=1)  # its lease passed, a second worker takes it
    store.claim()
    before = store.get(job), len(store.events(job))
    stale = (
        lambda: store.progress(job, 2, 9, 0.4, {}, start=1),
        lambda: store.record(job, "log", {"text": "I live"}, start=1),
        lambda: store.checkpointed(job, 2, start=1),
        lambda: store.heartbeat(job, start=1),
        lambda: store.set_reference(job, "local:a:1:1.0:", start=1),
        lambda: store.set_state(job, "finished", start=1),
        lambda: store.requests(job, start=1),
    )
    for write in stale:
        with pytest.raises(JobLost):
            write()
    assert not store.take(job, "save", start=1)
    assert (store.get(job), len(store.events(job))) == before
    store.set_state(job, "finished", start=2)
    with pytest.raises(JobLost):
        store.progress(job, 3, 9, 0.4, {}, start=2)


def test_events_come_in_order_and_by_type(store: JobStore) -> None:
    job, other = store.create("gate", {}), store.create("gate", {})
    store.progress(job, 1, 9, 0.5, {"balance": 0.1, "held_out": float("nan"), "grad_norm": float("inf")})
    store.record(other, "log", {"text": "not mine"})
    store.record(job, "sample", {"path": "a.png", "scores": {"robot": 0.5, "alien": float("nan")}}, step=1)
    store.record(job, "log", {"text": "nul\0"})
    store.progress(job, 2, 9, 0.4, {})
    steps = store.events(job, types=["progress"])
    assert [(event.step, event.data) for event in steps] == [(1, {"loss": 0.5, "balance": 0.1}), (2, {"loss": 0.4})]
    assert [event.type for event in store.events(job, after=steps[0].number)] == ["sample", "log", "progress"]
    assert store.events(job, types=["sample"])[0].data == {"path": "a.png", "scores": {"robot": 0.5}}
    now = store.get(job)
    assert (now.step, now.total, now.loss) == (2, 9, 0.4) and now.heartbeat is not None
    store.forget(job, ["progress"])
    assert [event.type for event in store.events(job)] == ["state", "sample", "log"]


def test_lists_by_owner_and_state(store: JobStore) -> None:
    mine = store.create("gate", {}, owner="me")
    more = store.create("gate", {}, owner="me")
    alone = store.create("subject", {})
    store.create("subject", {}, owner="you")
    assert [job.id for job in store.list(owner="me")] == [more, mine]
    assert [job.owner for job in store.list(kind="subject")] == ["you", None]
    assert store.list(["running"]) == [] and len(store.list(limit=None)) == 4
    assert store.siblings(mine) == [more] and store.siblings(alone) == []


def test_the_single_user_sees_no_visitor_s_jobs(store: JobStore) -> None:
    mine, hers = store.create("gate", {"steps": 1}), store.create("gate", {"steps": 1}, owner="ann")
    assert [job.id for job in store.list(owner="")] == [mine]
    assert [job.id for job in store.list(owner="ann")] == [hers] and len(store.list()) == 2


def test_only_ended_jobs_are_deleted_or_held(store: JobStore) -> None:
    job = store.create("gate", {})
    with pytest.raises(InvalidRequest, match="cancel it"):
        store.delete(job)
    with store.held_ended(job) as ended:
        assert not ended
    store.request_cancel(job)
    with store.held_ended(job) as ended:
        assert ended
    store.delete(job)
    assert store.list() == [] and store.events(job) == []


def test_configuration_and_result_come_back_as_they_were(store: JobStore) -> None:
    config = {"steps": 5, "lr": None, "flip": True, "experts": [{"name": "ä“", "alpha": 1e-3}]}
    job = store.create("gate", config, title="robot + ä")
    store.claim()
    store.set_state(job, "finished", result={"path": "a/b", "seconds": 0.25}, reason="none\0")
    found = store.get(job)
    assert (found.config, found.result, found.title) == (config, {"path": "a/b", "seconds": 0.25}, "robot + ä")
    assert found.reason == "none" and found.cancel is False


@pytest.mark.parametrize("name", ["../../etc", "0" * 31, "0" * 33, "A" * 32, "0" * 31 + "/", "", "0" * 32 + "\n"])
def test_ids_cannot_leave_the_folder(tmp_path: Path, name: str) -> None:
    store = JobStore.of(tmp_path)
    for use in (store.get, store.request_cancel, lambda text: job_folder(tmp_path, text)):
        with pytest.raises(InvalidRequest, match="hexadecimal"):
            use(name)


def test_unknown_job_is_named(store: JobStore) -> None:
    for use in (store.get, store.heartbeat, store.request_save, store.resume, store.siblings):
        with pytest.raises(InvalidRequest, match="no job"):
            use("0" * 32)


def test_database_is_in_wal_mode_and_reopens(tmp_path: Path) -> None:
    store = JobStore.of(tmp_path)
    job = store.create("gate", {"steps": 5, "experts": [{"name": "a"}]})
    store.close()
    with sqlite3.connect(tmp_path / "library.db") as raw:
        assert raw.execute("PRAGMA journal_mode").fetchone()[0] == "wal"
    assert JobStore.of(tmp_path).get(job).config == {"steps": 5, "experts": [{"name": "a"}]}


OLDER = """
CREATE TABLE jobs (number INTEGER NOT NULL PRIMARY KEY, id VARCHAR(32) NOT NULL UNIQUE, kind VARCHAR(32) NOT NULL,
  title TEXT NOT NULL, owner VARCHAR(128), config JSON NOT NULL, state VARCHAR(16) NOT NULL, step INTEGER NOT NULL,
  total INTEGER NOT NULL, loss FLOAT, reason TEXT, result JSON, attempts INTEGER NOT NULL, created FLOAT NOT NULL,
  started FLOAT, ended FLOAT, heartbeat FLOAT, host VARCHAR(255), pid INTEGER, pid_started FLOAT,
  cancel BOOLEAN NOT NULL, save BOOLEAN NOT NULL, sample BOOLEAN NOT NULL);
CREATE TABLE job_events (number INTEGER NOT NULL PRIMARY KEY, job VARCHAR(32) NOT NULL, time FLOAT NOT NULL,
  type VARCHAR(16) NOT NULL, step INTEGER, data JSON NOT NULL);
INSERT INTO jobs VALUES (1, '{}', 'gate', 'old', NULL, '{{"steps": 3}}', 'running', 2, 3, 0.5, NULL, NULL, 1, 1.0,
  2.0, NULL, 3.0, 'here', 77, 1700000000.25, 0, 0, 0);
INSERT INTO job_events VALUES (1, '{}', 1.0, 'log', NULL, '{{"text": "kept"}}');
"""


def test_an_older_database_gets_the_new_columns(tmp_path: Path) -> None:
    job = "ab" * 16
    with sqlite3.connect(tmp_path / "library.db") as raw:
        raw.executescript(OLDER.format(job, job))
    store = JobStore.of(tmp_path)
    found = store.get(job)
    assert (found.title, found.step, found.priority, found.starts, found.devices) == ("old", 2, 0, 0, 1)
    assert (found.pause, found.worker) == (False, None)
    assert (found.pid, found.pid_started) == (77, 1700000000.25), "a job that runs meanwhile is adopted"
    assert [event.data for event in store.events(job)] == [{"text": "kept"}]
    following = store.create("gate", {}, priority=3)
    claimed = store.claim()
    assert claimed is not None and claimed.id == following


def _open(address: str, gate: object) -> None:
    gate.wait()  # type: ignore[attr-defined]
    JobStore(address).create("gate", {})


def test_processes_that_open_a_new_database_at_once_make_it_once(url: str) -> None:  # noqa: F811
    context = multiprocessing.get_context("fork")
    gate = context.Barrier(4)
    processes = [context.Process(target=_open, args=(url, gate)) for _ in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0] * 4
    assert len(JobStore(url).list()) == 4


def test_a_server_that_does_not_answer_is_named_without_its_password(tmp_path: Path) -> None:
    address = f"postgresql://mole:{PASSWORD}@/jobs?host={tmp_path}"
    with pytest.raises(StoreUnavailable, match="does not answer") as caught:
        JobStore(address)
    assert PASSWORD not in str(caught.value) and "mole:***@" in str(caught.value)
    assert shown(address).startswith("postgresql+psycopg://mole:***@/jobs?host=")


def test_what_is_no_database_is_refused_without_repeating_it() -> None:
    for address, words in (
        (f"://{PASSWORD}", "by a URL"),
        (f"oracles://me:{PASSWORD}@host/x", "'oracles' are unknown"),
    ):
        with pytest.raises(InvalidRequest, match=words) as caught:
            JobStore(address)
        assert PASSWORD not in str(caught.value)


def test_a_missing_driver_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "psycopg", None)
    with pytest.raises(InvalidRequest, match=r"needs the Python package psycopg.*pip install") as caught:
        make_engine(f"postgres://mole:{PASSWORD}@host/jobs")
    assert PASSWORD not in str(caught.value)


def test_the_password_is_in_no_error_of_the_engine(store: JobStore) -> None:
    with pytest.raises(sa.exc.DBAPIError) as caught, store.engine.begin() as connection:
        connection.execute(sa.text("SELECT nothing FROM nowhere"))
    assert PASSWORD not in str(caught.value) and PASSWORD not in repr(store.engine)
