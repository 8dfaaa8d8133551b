"""Several worker processes, one per device, share one PostgreSQL store: no job runs twice and none is lost."""

from __future__ import annotations

import multiprocessing
import os
import sys
from collections import Counter
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path

from tests.training.postgres import PASSWORD, new_schema  # noqa: F401 - a fixture
from tests.training.test_jobs_worker import command, wait_for
from training.jobs.executor import LocalExecutor, process_start
from training.jobs.store import JobStore, job_folder
from training.jobs.worker import Timing, Worker

JOBS = 40
FORK = multiprocessing.get_context("fork")


class Forked:
    """A start of a job as a forked process: forty interpreters would take long to start."""

    def __init__(self, process: BaseProcess, reference: str) -> None:
        self.process, self.reference = process, reference

    def alive(self) -> bool:
        return self.process.is_alive()

    def terminate(self) -> None:
        self.process.terminate()

    def kill(self) -> None:
        self.process.kill()
        self.process.join()


class ForkExecutor:
    """Runs a short job that notes each time it is run."""

    def __init__(self, address: str) -> None:
        self.address = address

    def start(self, job_id: str, data_dir: Path, start: int = 1, devices: int = 1) -> Forked:
        process = FORK.Process(target=short_job, args=(self.address, job_id, data_dir, start))
        process.start()
        return Forked(process, f"forked:{process.pid}")

    def adopt(self, reference: str) -> Forked:
        raise AssertionError(f"nobody died, and yet {reference} was adopted")


def short_job(address: str, job_id: str, data_dir: Path, start: int) -> None:
    store = JobStore(address)
    with (data_dir / "runs.txt").open("a") as runs:  # appended whole: the lines are short
        runs.write(f"{job_id} {start}\n")
    for step in range(1, 4):
        store.progress(job_id, step, 3, 1 / step, {}, start)
    store.set_state(job_id, "finished", start=start)
    store.close()


def serve(address: str, data_dir: Path, device: str, gate: object) -> None:
    store = JobStore(address)
    worker = Worker(store, data_dir, executor=ForkExecutor(address), timing=Timing(poll=0.01), device=device)
    worker.acquire()
    gate.wait()  # type: ignore[attr-defined]
    worker.serve(once=True)
    sys.stderr.flush()
    os._exit(0 if worker.ended["finished"] > 0 else 3)


def test_two_workers_share_forty_jobs(new_schema: Callable[[], str], tmp_path: Path) -> None:  # noqa: F811
    address = new_schema()
    store = JobStore(address)
    ids = [store.create("gate", {"steps": 3}) for _ in range(JOBS)]
    store.close()  # no connection may be inherited
    gate = FORK.Barrier(2)
    workers = [FORK.Process(target=serve, args=(address, tmp_path, f"cpu:{n}", gate)) for n in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(120)
    assert [worker.exitcode for worker in workers] == [0, 0], "each had its share"
    runs = Counter((tmp_path / "runs.txt").read_text().splitlines())
    assert runs == {f"{job} 1": 1 for job in ids}, "none twice, none lost"
    store = JobStore(address)
    finished = store.list(["finished"], limit=None)
    assert {job.id for job in finished} == set(ids) and len({job.worker for job in finished}) == 2
    for job in ids:
        states = [event.data["state"] for event in store.events(job, types=["state"])]
        assert states == ["queued", "running", "finished"]


def test_a_real_child_reaches_the_server_and_shows_no_password(
    new_schema: Callable[[], str],  # noqa: F811
    tmp_path: Path,
) -> None:
    import psutil

    address = new_schema()
    store = JobStore(address)
    executor = LocalExecutor(command, database=address)
    worker = Worker(store, tmp_path, executor=executor, timing=Timing(poll=0.02))
    job = store.create("gate", {"steps": 1000, "pause": 0.02})
    wait_for(lambda: worker.tick() or store.get(job).step >= 2)
    child = psutil.Process(store.get(job).pid)
    assert process_start(child.pid) > 0 and PASSWORD not in " ".join(child.cmdline())
    store.request_cancel(job)
    wait_for(lambda: worker.tick() or worker.ended)
    assert store.get(job).state == "cancelled"
    assert not (tmp_path / "library.db").exists(), "the child used the server"
    seen = [(job_folder(tmp_path, job) / "log.txt").read_text(), str(store.events(job)), repr(store.get(job))]
    assert PASSWORD not in "".join(seen)
