"""The worker with real processes: order, kill and retry, cancel, pause, adoption, leases, one worker per device."""

from __future__ import annotations

import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from mole_diffusion.errors import InvalidRequest
from training.jobs.database import make_engine
from training.jobs.executor import (
    LocalExecutor,
    LocalProcess,
    child_environment,
    is_alive,
    process_start,
    training_command,
)
from training.jobs.limits import Limits
from training.jobs.states import TERMINAL
from training.jobs.store import Job, JobStore, job_folder
from training.jobs.worker import Timing, Worker, last_line

TIMING = Timing(poll=0.02, term_grace=0.5, lease=30)


def command(job_id: str, data_dir: Path, start: int, devices: int) -> list[str]:
    return [sys.executable, "-m", "tests.training.child", job_id, str(data_dir), str(start)]


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
    secrets = ("HF_TOKEN", "OAUTH_CLIENT_SECRET", "OAUTH_CLIENT_ID", "MOLE_PASSWORD", "WANDB_API_KEY", "PGPASSWORD")
    secrets += ("MOLE_DATABASE_URL", "DATABASE_URL")  # told only where the database is a server's
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


def test_reused_pid_is_not_adopted(store: JobStore, new_worker: Callable[[], Worker], tmp_path: Path) -> None:
    job = store.create("gate", {"steps": 2})
    store.claim(Worker(store, tmp_path).name)
    other = LocalProcess(os.getpid(), process_start(os.getpid()) - 1000, "no such mark", socket.gethostname())
    store.set_reference(job, other.reference)  # lives, but started at another time
    new_worker()
    assert ended(store, job).state == "finished"


def test_job_of_another_worker_is_left_alone_until_its_lease_ends(store: JobStore, tmp_path: Path) -> None:
    job = store.create("gate", {"steps": 2})
    store.claim("elsewhere/cuda:0")
    store._update(job, host="elsewhere")
    worker = Worker(store, tmp_path, executor=LocalExecutor(command), timing=Timing(poll=0.02, lease=0.3))
    for _ in range(3):  # its clock may be wrong, but it beats
        store._update(job, heartbeat=(store.get(job).heartbeat or 0) - 1000)
        worker.tick()
        time.sleep(0.2)
    assert store.get(job).state == "running" and store.get(job).starts == 1
    wait_for(lambda: worker.tick() or store.get(job).starts == 2)
    wait_for(lambda: worker.tick() or worker.ended["finished"])
    assert worker.ended == {"queued": 1, "finished": 1}


def test_a_child_whose_job_was_started_again_stops_itself(
    store: JobStore, new_worker: Callable[[], Worker], tmp_path: Path
) -> None:
    job = store.create("gate", {"steps": 1000, "pause": 0.02})
    first = new_worker()
    wait_for(lambda: store.get(job).step >= 1)
    first.stop()
    stale = LocalProcess.of(store.get(job).reference or "")
    store.set_state(job, "queued")  # another host saw no heartbeat
    again = store.claim("elsewhere/cuda:0")
    assert again is not None and again.starts == 2
    wait_for(lambda: not stale.alive())
    assert store.get(job).state == "running" and store.get(job).starts == 2
    assert "taken away" in (job_folder(tmp_path, job) / "log.txt").read_text()


def test_pause_frees_the_device_and_resume_goes_on(
    store: JobStore, new_worker: Callable[[], Worker], tmp_path: Path
) -> None:
    job, waiting = (store.create("gate", {"steps": n, "pause": 0.02, "checkpoints": True}) for n in (40, 2))
    new_worker()
    wait_for(lambda: len(store.events(job, types=["saved"])) >= 3)
    process = LocalProcess.of(store.get(job).reference or "")
    store.request_pause(job)
    wait_for(lambda: store.get(job).state == "paused")
    assert ended(store, waiting).state == "finished" and not process.alive()
    store.resume(job)
    assert ended(store, job).state == "finished"
    assert states(store, job) == ["queued", "running", "paused", "queued", "running", "finished"]
    starts = (job_folder(tmp_path, job) / "log.txt").read_text().split("started at ")[1:]
    assert int(starts[1]) >= 3


def test_a_deaf_child_is_paused_all_the_same(store: JobStore, tmp_path: Path) -> None:
    job = store.create("gate", {"steps": 1000, "pause": 0.02, "deaf": True})
    timing = Timing(poll=0.02, term_grace=60, pause_grace=0.2)
    worker = Worker(store, tmp_path, executor=LocalExecutor(command), timing=timing)
    wait_for(lambda: worker.tick() or store.get(job).step >= 1)
    store.request_pause(job)
    wait_for(lambda: worker.tick() or store.get(job).state == "paused")


def test_shutdown_of_the_machine_queues_the_job(store: JobStore, new_worker: Callable[[], Worker]) -> None:
    job = store.create("gate", {"steps": 30, "pause": 0.02, "checkpoints": True})
    worker = new_worker()
    wait_for(lambda: store.get(job).step >= 1)
    worker.stop()
    os.killpg(store.get(job).pid or 0, signal.SIGTERM)
    wait_for(lambda: store.get(job).state == "queued")
    new_worker()
    assert ended(store, job).state == "finished" and store.get(job).starts == 2


@pytest.mark.parametrize("session", ["same session", "own session"])
@pytest.mark.parametrize("way", ["cancel", "crash"])
def test_grandchildren_end_with_the_job(
    store: JobStore, new_worker: Callable[[], Worker], tmp_path: Path, session: str, way: str
) -> None:
    job = store.create("gate", {"steps": 1000, "pause": 0.02, "grandchild": session})
    new_worker()
    wait_for(lambda: store.get(job).step >= 1)
    grandchild = int((job_folder(tmp_path, job) / "grandchild").read_text())
    started = process_start(grandchild)
    assert is_alive(grandchild, started)
    store.request_cancel(job)
    if way == "crash":
        os.kill(store.get(job).pid or 0, signal.SIGKILL)
    assert ended(store, job).state == "cancelled"
    wait_for(lambda: not is_alive(grandchild, started), 20)


def test_an_executor_elsewhere_fits_behind_the_protocol(store: JobStore, tmp_path: Path) -> None:
    """A cluster whose processes are threads: found again by name, by any worker."""
    started: dict[str, threading.Thread] = {}

    class Remote:
        def __init__(self, reference: str) -> None:
            self.reference = reference

        def alive(self) -> bool:
            return started[self.reference].is_alive()

        def terminate(self) -> None: ...

        def kill(self) -> None: ...

    class Cluster:
        def start(self, job_id: str, data_dir: Path, start: int = 1, devices: int = 1) -> Remote:
            def work() -> None:
                release.wait()
                store.set_state(job_id, "finished", result={"devices": devices}, start=start)

            started[f"cluster:{job_id}.{start}"] = thread = threading.Thread(target=work)
            thread.start()
            return Remote(f"cluster:{job_id}.{start}")

        def adopt(self, reference: str) -> Remote:
            return Remote(reference)

    release = threading.Event()
    job = store.create("gate", {"devices": 4})
    first, second = (Worker(store, tmp_path, executor=Cluster(), timing=TIMING) for _ in range(2))
    first.tick()
    assert (store.get(job).state, store.get(job).reference, store.get(job).pid) == ("running", f"cluster:{job}.1", None)
    second.tick()  # the first one is gone; the second adopts what runs on the cluster
    release.set()
    wait_for(lambda: second.tick() or second.ended)
    assert second.ended == {"finished": 1} and store.get(job).result == {"devices": 4}


def test_several_devices_are_given_to_torchs_launcher(tmp_path: Path) -> None:
    job = "0" * 32
    plain = ["-m", "training", "run-job", job, "--data-dir", str(tmp_path), "--attempt", "3"]
    assert training_command(job, tmp_path, 3, 1) == [sys.executable, *plain]
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    assert training_command(job, tmp_path, 3, 2) == [sys.executable, *launcher, *plain]


def test_the_database_and_the_limits_are_told_to_the_child(tmp_path: Path) -> None:
    address = "postgresql+psycopg://me:hidden@host/jobs"
    told = ("MOLE_DATABASE_URL", "MOLE_JOB", "MOLE_MAX_DISK_MB")
    say = f"import os; print(*map(os.environ.get, {told}))"
    for number, (database, heard) in enumerate({address: address, f"sqlite:///{tmp_path}/x.db": "None"}.items()):
        job = f"{number:032x}"
        executor = LocalExecutor(
            lambda *_: [sys.executable, "-c", say], database=database, limits=Limits(disk_mb_per_owner=7)
        )
        process = executor.start(job, tmp_path, 2)
        assert process.child is not None and process.child.wait() == 0
        assert (tmp_path / "jobs" / job / "log.txt").read_text().split() == [heard, f"{job}.2", "7"]
        assert "hidden" not in " ".join(map(str, process.child.args)) + process.reference  # type: ignore[arg-type]


def test_a_worker_outlives_a_store_that_is_away(store: JobStore, tmp_path: Path) -> None:
    job = store.create("gate", {"steps": 3})
    worker = Worker(store, tmp_path, executor=LocalExecutor(command), timing=TIMING)
    away = store.engine
    store.engine = make_engine(f"sqlite:///{tmp_path / 'missing' / 'library.db'}")
    worker._guarded_tick()
    assert not worker._idle
    store.engine = away
    wait_for(lambda: worker._guarded_tick() or worker.ended)
    assert store.get(job).state == "finished"


def test_serving_once_ends_when_nothing_waits(store: JobStore, tmp_path: Path) -> None:
    first, second = (store.create("gate", {"steps": 1}) for _ in range(2))
    worker = Worker(store, tmp_path, executor=LocalExecutor(command), timing=TIMING)
    worker.acquire()
    worker.serve(once=True)
    assert {store.get(job).state for job in (first, second)} == {"finished"}
    assert worker.ended == {"finished": 2} and not worker._lock.is_locked


def test_command_that_cannot_start_fails(store: JobStore, tmp_path: Path) -> None:
    job = store.create("gate", {"steps": 2})
    Worker(store, tmp_path, executor=LocalExecutor(lambda *_: [str(tmp_path / "missing")])).tick()
    assert store.get(job).state == "failed" and "could not be started" in (store.get(job).reason or "")


def test_one_worker_per_device_and_one_in_reserve(
    store: JobStore, new_worker: Callable[[], Worker], tmp_path: Path
) -> None:
    first = new_worker()
    wait_for(lambda: first._lock.is_locked)
    with pytest.raises(InvalidRequest, match="Another worker"):
        Worker(store, tmp_path).acquire()
    beside = Worker(store, tmp_path, device="cuda:1")
    beside.acquire()
    beside._lock.release()
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


def test_files_that_cannot_be_removed_do_not_stop_the_queue(
    store: JobStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("training.jobs.worker.prune", full)
    job = store.create("gate", {"steps": 1})
    worker = Worker(store, tmp_path, executor=LocalExecutor(command), timing=TIMING)
    worker.tick()
    assert store.get(job).state == "running"
    wait_for(lambda: worker.tick() or store.get(job).state == "finished")


def test_a_job_that_is_removed_as_it_ends_does_not_hold_the_worker(store: JobStore, tmp_path: Path) -> None:
    job = store.create("gate", {"steps": 1})
    worker = Worker(store, tmp_path, executor=LocalExecutor(command), timing=TIMING)
    worker.tick()
    wait_for(lambda: store.get(job).state == "finished")
    store.delete(job)
    following = store.create("gate", {"steps": 1})
    wait_for(lambda: worker.tick() or store.get(following).state == "finished")
