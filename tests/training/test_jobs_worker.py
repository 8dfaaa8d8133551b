"""The worker with real processes: order, kill and retry, cancel, adoption after a restart, one worker per folder."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from mole_diffusion.errors import InvalidRequest
from training.jobs.executor import LocalExecutor, child_environment, is_alive, process_start
from training.jobs.states import TERMINAL
from training.jobs.store import Job, JobStore, job_folder
from training.jobs.worker import Timing, Worker, last_line

TIMING = Timing(poll=0.02, term_grace=0.5, lease=30)


def command(job_id: str, data_dir: Path) -> list[str]:
    return [sys.executable, "-m", "tests.training.child", job_id, str(data_dir)]


@pytest.fixture
def store(tmp_path: Path) -> Iterator[JobStore]:
    store = JobStore.of(tmp_path)
    yield store
    for job in store.list(["running"]):
        if job.pid and is_alive(job.pid, job.pid_started or 0):
            os.killpg(job.pid, signal.SIGKILL)


@pytest.fixture
def new_worker(store: JobStore, tmp_path: Path) -> Iterator[Callable[[], Worker]]:
    workers: list[Worker] = []

    def make() -> Worker:
        worker = Worker(store, tmp_path, executor=LocalExecutor(command), timing=TIMING)
        workers.append(worker)
        worker.start()
        return worker

    yield make
    for worker in workers:
        worker.stop()


def wait_for(condition: Callable[[], object], seconds: float = 140) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)


def ended(store: JobStore, job_id: str) -> Job:
    wait_for(lambda: store.get(job_id).state in TERMINAL)
    return store.get(job_id)


def states(store: JobStore, job_id: str) -> list[str]:
    return [event.data["state"] for event in store.events(job_id, types=["state"])]


def test_two_jobs_run_one_after_the_other(store: JobStore, new_worker: Callable[[], Worker]) -> None:
    first, second = store.create("gate", {"steps": 5}), store.create("gate", {"steps": 3})
    new_worker()
    assert ended(store, second).result == {"steps": 3}
    one, two = store.get(first), store.get(second)
    assert one.state == two.state == "finished" and one.ended <= two.started  # type: ignore[operator]
    assert states(store, first) == ["queued", "running", "finished"]


def test_child_gets_no_secrets_and_a_log(
    store: JobStore, new_worker: Callable[[], Worker], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    secrets = ("HF_TOKEN", "OAUTH_CLIENT_SECRET", "OAUTH_CLIENT_ID", "MOLE_PASSWORD", "WANDB_API_KEY")
    for name in secrets:
        monkeypatch.setenv(name, "secret")
    assert not set(secrets) & set(child_environment()) and "PATH" in child_environment()
    job = store.create("gate", {"steps": 1})
    new_worker()
    ended(store, job)
    folder = job_folder(tmp_path, job)
    assert not set(secrets) & set((folder / "environment.txt").read_text().split())
    assert (folder / "log.txt").read_text() == "started at 0\n"


def test_killed_child_is_queued_again_and_resumes(
    store: JobStore, new_worker: Callable[[], Worker], tmp_path: Path
) -> None:
    job = store.create("gate", {"steps": 40, "pause": 0.05, "checkpoints": True})
    new_worker()
    wait_for(lambda: len(store.events(job, types=["saved"])) >= 3)
    os.kill(store.get(job).pid or 0, signal.SIGKILL)
    assert ended(store, job).state == "finished", store.get(job).reason
    assert states(store, job) == ["queued", "running", "queued", "running", "finished"]
    starts = (job_folder(tmp_path, job) / "log.txt").read_text().split("started at ")[1:]
    assert int(starts[0]) == 0 and int(starts[1]) >= 3


def test_child_that_dies_again_fails_with_its_last_words(store: JobStore, new_worker: Callable[[], Worker]) -> None:
    job = store.create("gate", {"steps": 9, "die_at": 2})
    new_worker()
    end = ended(store, job)
    assert end.state == "failed" and end.attempts == 2
    assert "out of memory, said the machine" in (end.reason or "")


@pytest.mark.parametrize("deaf", [False, True])
def test_cancel_ends_the_child(store: JobStore, new_worker: Callable[[], Worker], deaf: bool) -> None:
    job = store.create("gate", {"steps": 1000, "pause": 0.05, "deaf": deaf})
    new_worker()
    wait_for(lambda: store.get(job).step >= 1)
    running = store.get(job)
    store.request_cancel(job)
    assert ended(store, job).state == "cancelled"
    assert running.pid is not None
    wait_for(lambda: not is_alive(running.pid or 0, running.pid_started or 0))
    following = store.create("gate", {"steps": 1})
    assert ended(store, following).state == "finished"


def test_restarted_worker_adopts_the_living_child(store: JobStore, new_worker: Callable[[], Worker]) -> None:
    job, waiting = store.create("gate", {"steps": 30, "pause": 0.05}), store.create("gate", {"steps": 1})
    first = new_worker()
    wait_for(lambda: store.get(job).step >= 2)
    first.stop()
    pid = store.get(job).pid
    new_worker()
    assert ended(store, job).state == "finished"
    assert store.get(job).pid == pid and states(store, job) == ["queued", "running", "finished"]
    assert ended(store, waiting).started >= store.get(job).ended  # type: ignore[operator]


def test_restarted_worker_queues_the_dead_child(store: JobStore, new_worker: Callable[[], Worker]) -> None:
    job = store.create("gate", {"steps": 10, "pause": 0.05, "checkpoints": True})
    first = new_worker()
    wait_for(lambda: store.get(job).step >= 2)
    first.stop()
    os.killpg(store.get(job).pid or 0, signal.SIGKILL)
    new_worker()
    assert ended(store, job).state == "finished"
    assert states(store, job).count("running") == 2


def test_reused_pid_is_not_adopted(store: JobStore, new_worker: Callable[[], Worker]) -> None:
    job = store.create("gate", {"steps": 2})
    store.claim()
    store.set_process(job, os.getpid(), process_start(os.getpid()) - 1000)  # lives, but started at another time
    new_worker()
    assert ended(store, job).state == "finished"


def test_job_of_another_host_is_left_alone_until_its_lease_ends(store: JobStore, tmp_path: Path) -> None:
    job = store.create("gate", {"steps": 2})
    store.claim()
    store._update(job, host="elsewhere")
    worker = Worker(store, tmp_path, executor=LocalExecutor(command), timing=TIMING)
    worker.tick()
    assert store.get(job).state == "running" and store.get(job).attempts == 1
    store._update(job, heartbeat=time.time() - 31)
    worker.tick()
    assert store.get(job).attempts == 2


def test_command_that_cannot_start_fails(store: JobStore, tmp_path: Path) -> None:
    job = store.create("gate", {"steps": 2})
    Worker(store, tmp_path, executor=LocalExecutor(lambda *_: [str(tmp_path / "missing")])).tick()
    assert store.get(job).state == "failed" and "could not be started" in (store.get(job).reason or "")


def test_one_worker_per_folder_and_one_in_reserve(
    store: JobStore, new_worker: Callable[[], Worker], tmp_path: Path
) -> None:
    first, _second = new_worker(), None
    wait_for(lambda: first._lock.is_locked)
    with pytest.raises(InvalidRequest, match="Another worker"):
        Worker(store, tmp_path).acquire()
    second = new_worker()
    first.stop()
    wait_for(lambda: second._lock.is_locked)
    job = store.create("gate", {"steps": 1})
    assert ended(store, job).state == "finished"


def test_last_line_of_a_log(tmp_path: Path) -> None:
    log = tmp_path / "log.txt"
    assert last_line(log) == "(nothing)"
    log.write_bytes(b"first\nlast \xff words\n\n  \n")
    assert last_line(log).startswith("last")
