"""Jobs from record to result: real tasks on tiny bases, one of them in a real process that is killed."""

from __future__ import annotations

import hashlib
import math
import os
import resource
import shutil
import signal
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from mole_diffusion import Expert
from mole_diffusion.errors import InvalidRequest
from mole_diffusion.persist import read_composition_header
from tests.tiny import tiny_subject
from tests.training.helpers import load, lora
from tests.training.test_jobs_worker import ended, wait_for
from training.events import Progress
from training.jobs import channel, database
from training.jobs.channel import Claim, DatabaseControl, DatabaseSink, Heartbeat
from training.jobs.errors import JobLost, StoreUnavailable
from training.jobs.kinds import BUILDERS, gate_expert, inside
from training.jobs.run import run_job
from training.jobs.store import Job, JobStore, job_folder
from training.jobs.worker import Timing, Worker
from training.tasks.gate import ExpertEntry

SMALL = {"steps": 3, "batch": 2, "pool": 4, "validation": 2, "validate_every": 3, "self_views": 2, "sample_every": 0,
         "validate_prompts": 0}  # fmt: skip


def add_expert(data: Path, pipe: Any, name: str, seed: int, **options: Any) -> dict[str, str]:
    """Put a LoRA into the library folder and give its entry in a job."""
    file = lora(data / "uploads", pipe, name, seed=seed, **options)
    sha256 = hashlib.sha256(file.read_bytes()).hexdigest()
    (data / "experts").mkdir(exist_ok=True)
    shutil.move(file, data / "experts" / f"{sha256}.safetensors")
    return {"sha256": sha256, "name": name, "trigger": f"zwx {name}", "class": name}


def run_claimed(store: JobStore, data: Path, kind: str, config: dict) -> tuple[int, Job]:
    job = store.create(kind, config)
    claimed = store.claim()
    assert claimed is not None and claimed.id == job
    code = run_job(data, job)
    return code, store.get(job)


@pytest.fixture
def store(tmp_path: Path) -> JobStore:
    return JobStore.of(tmp_path)


@pytest.mark.parametrize("kind", ["sd-v", "sdxl"])
def test_gate_job_with_two_bare_files(
    store: JobStore, tmp_path: Path, base_folders: dict[str, Path], kind: str
) -> None:
    _, pipe = load(base_folders[kind])
    experts = [add_expert(tmp_path, pipe, name, seed) for seed, name in enumerate(("robot", "alien"), 1)]
    config = {**SMALL, "base": str(base_folders[kind]), "experts": experts, "scope": "token"}
    config |= {"sample_every": 3, "validate_prompts": 1, "validate_picture_steps": 2} if kind == "sd-v" else {}
    code, job = run_claimed(store, tmp_path, "gate", config)
    assert (code, job.state) == (0, "finished"), job.reason
    assert job.result is not None and job.result["path"] == f"compositions/{job.id}.safetensors"
    header = read_composition_header(tmp_path / job.result["path"])
    assert [expert["sha256"] for expert in header["experts"]] == [entry["sha256"] for entry in experts]
    folder, cache = job_folder(tmp_path, job.id), tmp_path / "cache"
    assert [len(list(made.glob("*.png"))) for made in (cache / "views").glob("views-*")] == [2, 2]
    again = run_claimed(store, tmp_path, "gate", job.config)[1]
    assert again.state == "finished" and (again.result or {})["cached"] is True
    one, two = (tmp_path / str((made.result or {})["path"]) for made in (job, again))
    assert one != two and one.read_bytes() == two.read_bytes()
    refused = run_claimed(store, tmp_path, "gate", {**job.config, "reuse": "no"})[1]
    assert refused.state == "failed" and "reuse is true or false" in (refused.reason or "")
    assert (folder / "config.json").is_file()
    samples = store.events(job.id, types=["sample"])
    assert [event.step for event in samples] == ([0, 3] if kind == "sd-v" else [])
    assert all((folder / event.data["path"]).is_file() for event in samples)
    assert [event.step for event in store.events(job.id, types=["progress"])] == [1, 2, 3]


def test_gate_job_uses_the_library_s_pictures(store: JobStore, tmp_path: Path, base_folders: dict[str, Path]) -> None:
    _, pipe = load(base_folders["sd-v"])
    experts = [add_expert(tmp_path, pipe, name, seed) for seed, name in enumerate(("robot", "alien"), 1)]
    for entry, colour in zip(experts, ("red", "green"), strict=True):
        made = tiny_subject(tmp_path / "drawn", entry["name"], colour)
        shutil.copytree(made / "train", tmp_path / "subjects" / entry["sha256"])
    code, job = run_claimed(store, tmp_path, "gate", {**SMALL, "base": str(base_folders["sd-v"]), "experts": experts})
    assert (code, job.state) == (0, "finished"), job.reason
    assert not list((tmp_path / "cache" / "views").glob("views-*"))


def test_subject_job_and_its_failures(store: JobStore, tmp_path: Path, base_folders: dict[str, Path]) -> None:
    tiny_subject(tmp_path / "subjects", "robot", "red")
    config = {
        "base": str(base_folders["sd-v"]), "token": "zwx", "class": "robot", "images": "subjects/robot/train",
        "steps": 2, "batch": 2, "pool": 4, "rank": 2, "name": "My robot", "sample_every": 0,
    }  # fmt: skip
    code, job = run_claimed(store, tmp_path, "subject", config)
    assert (code, job.state) == (0, "finished"), job.reason
    assert job.result is not None and job.result["path"] == f"jobs/{job.id}/result.safetensors"
    metadata = Expert.load(tmp_path / job.result["path"]).metadata
    assert metadata["modelspec.title"] == "My robot" and metadata["mole.class"] == "robot"
    for change, words in (
        ({"images": "../elsewhere"}, "folder of pictures in the data folder"),
        ({"rank": -1}, "rank is between"),
        ({"colour": "red"}, "Unknown setting"),
        ({"base": "imagined"}, "base"),
    ):
        code, job = run_claimed(store, tmp_path, "subject", {**config, **change})
        assert (code, job.state) == (1, "failed") and words in (job.reason or ""), job.reason


def test_unknown_kind_and_unclaimed_job(store: JobStore, tmp_path: Path) -> None:
    code, job = run_claimed(store, tmp_path, "haircut", {})
    assert code == 1 and "Unknown kind" in (job.reason or "")
    waiting = store.create("gate", {})
    with pytest.raises(InvalidRequest, match="is queued"):
        run_job(tmp_path, waiting)


def test_cancelled_before_its_first_step(store: JobStore, tmp_path: Path, base_folders: dict[str, Path]) -> None:
    tiny_subject(tmp_path / "subjects", "robot", "red")
    config = {"base": str(base_folders["sd-v"]), "token": "zwx", "class": "robot", "images": "subjects/robot/train",
              "pool": 2, "rank": 2, "sample_every": 0}  # fmt: skip
    job = store.create("subject", config)
    store.claim()
    store.request_cancel(job)
    assert run_job(tmp_path, job) == 0
    assert store.get(job).state == "cancelled" and store.get(job).step == 0


@pytest.mark.timeout(900)  # 25 s on an idle machine; a busy one starts two processes slowly
def test_real_process_killed_and_resumed(
    store: JobStore, tmp_path: Path, base_folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    tiny_subject(tmp_path / "subjects", "robot", "red")
    config = {
        "base": str(base_folders["sd-v"]), "token": "zwx", "class": "robot", "images": "subjects/robot/train",
        "steps": 30, "batch": 1, "pool": 2, "rank": 2, "save_every": 2, "sample_every": 0,
    }  # fmt: skip
    job = store.create("subject", config)
    worker = Worker(store, tmp_path, timing=Timing(poll=0.05, term_grace=5))
    worker.start()
    try:
        wait_for(lambda: store.events(job, types=["saved"]) or store.get(job).state == "failed", 400)
        os.kill(store.get(job).pid or 0, signal.SIGKILL)
        wait_for(lambda: store.get(job).state in ("finished", "failed"), 400)
    finally:
        worker.stop()
    assert ended(store, job).state == "finished", store.get(job).reason
    log = (job_folder(tmp_path, job) / "log.txt").read_text()
    assert "Resumed after step" in log
    assert Expert.load(job_folder(tmp_path, job) / "result.safetensors").trigger == "zwx robot"


def test_requests_reach_the_loop(store: JobStore) -> None:
    job = store.create("gate", {})
    store.claim()
    control = DatabaseControl(Claim(store, job, 1))
    assert not (control.should_stop() or control.should_pause() or control.take_save() or control.take_sample())
    store.request_save(job)
    store.request_sample(job)
    store.request_pause(job)
    wait_for(control.take_save, 5)
    assert not control.take_save()
    wait_for(control.take_sample, 5)
    wait_for(control.should_pause, 5)
    assert not control.should_stop()
    control.signalled.stop = True
    assert control.should_stop()


class Toy:
    """A task of two numbers; what happens in step 2, and in its third checkpoint, is the test's."""

    name, total_steps = "toy", 4

    def __init__(self, happens: Callable[[], object] = lambda: None, size: int = 1) -> None:
        self.happens, self.size, self.done = happens, size, 0

    def step(self, index: int) -> dict[str, float]:
        loss = self.happens() if index == 2 else None
        self.done = index + 1
        return {"loss": loss if isinstance(loss, float) else 0.5}

    def enough(self) -> bool:
        return False

    def state_dict(self) -> dict[str, Any]:
        return {"done": self.done, "weights": torch.zeros(self.size if self.done >= 2 else 1)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.done = state["done"]

    def sample(self, step: int, folder: Path) -> list[Any]:
        return []

    def finish(self, out: Path) -> dict[str, Any]:
        out.write_text(str(self.done))
        return {"done": self.done}


@pytest.fixture
def toy(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Makes "toy" a kind of job."""

    def make(happens: Callable[[], object] = lambda: None, size: int = 1) -> None:
        def build(settings: dict[str, Any], data: Path, folder: Path, log: Any) -> tuple[Toy, Path]:
            return Toy(happens, size), folder / "result.txt"

        monkeypatch.setitem(BUILDERS, "toy", build)

    return make


TOY = {"save_every": 1, "sample_every": 0}


def out_of_gpu_memory() -> None:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")


def out_of_memory() -> None:
    raise MemoryError


def not_a_number() -> float:
    return math.nan


@pytest.mark.parametrize(
    ("happens", "words"),
    [
        (out_of_gpu_memory, "too little memory for this job (batch 8). Lower the batch or the resolution, or choose"),
        (out_of_memory, "too little memory for this job (batch 8). Lower the batch"),
        (not_a_number, "start again with a lower learning rate"),
    ],
)
def test_what_goes_wrong_is_said_and_retry_goes_on(
    store: JobStore, tmp_path: Path, toy: Callable[..., None], happens: Callable[[], object], words: str
) -> None:
    toy(happens)
    code, job = run_claimed(store, tmp_path, "toy", {**TOY, "batch": 8})
    assert (code, job.state) == (1, "failed") and words in (job.reason or ""), job.reason
    toy()
    store.retry(job.id)
    store.claim()
    assert run_job(tmp_path, job.id) == 0
    assert store.get(job.id).state == "finished" and (job_folder(tmp_path, job.id) / "result.txt").read_text() == "4"
    assert [event.step for event in store.events(job.id, types=["progress"])] == [1, 2, 3, 4], "steps 1, 2 only once"


def test_a_full_disk_fails_the_job_and_leaves_the_last_checkpoint(
    store: JobStore, tmp_path: Path, toy: Callable[..., None]
) -> None:
    toy(size=1_000_000)  # from step 2 on, 4 MB
    job = store.create("toy", TOY)
    store.claim()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, limits[1]))  # no file of this process grows beyond
    try:
        assert run_job(tmp_path, job) == 1
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert store.get(job).state == "failed" and store.get(job).reason
    checkpoints = job_folder(tmp_path, job) / "checkpoints"
    assert [path.name for path in checkpoints.iterdir()] == ["step-00000001"], "no half file"
    toy()
    store.retry(job)
    store.claim()
    assert run_job(tmp_path, job) == 0 and store.get(job).state == "finished"


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("MOLE_MIN_FREE_MB", str(2**40), "must stay free; remove files, then retry"),
        ("MOLE_MAX_DISK_MB", "1", "MB on the disk and may hold 1.0 MB"),
    ],
)
def test_the_disk_s_limits_stop_a_job_between_files(
    store: JobStore, tmp_path: Path, toy: Callable[..., None], monkeypatch: pytest.MonkeyPatch,
    name: str, value: str, words: str,
) -> None:  # fmt: skip
    toy(size=1_000_000)
    monkeypatch.setenv(name, value)
    code, job = run_claimed(store, tmp_path, "toy", TOY)
    assert (code, job.state) == (1, "failed") and words in (job.reason or ""), job.reason
    whole = {path.name for path in job_folder(tmp_path, job.id).glob("checkpoints/*")}
    assert whole == (set() if name == "MOLE_MIN_FREE_MB" else {"step-00000001", "step-00000002"})


def test_an_expert_deleted_while_its_job_waits_is_named(store: JobStore, tmp_path: Path) -> None:
    entry = {"sha256": "0" * 64, "name": "robot", "trigger": "zwx", "class": "robot"}
    code, job = run_claimed(store, tmp_path, "gate", {"base": "demo", "experts": [entry, entry]})
    assert (code, job.state) == (1, "failed")
    assert job.reason == "The expert robot is no longer in the library; add its file again."


def test_pause_and_shutdown_end_with_a_checkpoint(
    store: JobStore, tmp_path: Path, toy: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(channel, "POLL", 0.0)
    job = store.create("toy", {"save_every": 0, "sample_every": 0})
    for ask, state in (
        (lambda: store.request_pause(job), "paused"),
        (lambda: os.kill(os.getpid(), signal.SIGTERM), "queued"),
        (lambda: store.request_cancel(job), "cancelled"),
    ):
        toy(ask)
        store.claim()
        assert run_job(tmp_path, job) == 0
        assert store.get(job).state == state
        assert [path.name for path in (job_folder(tmp_path, job) / "checkpoints").iterdir()] == ["step-00000003"]
        shutil.rmtree(job_folder(tmp_path, job))
        if state != "queued":
            store.resume(job)
    toy()
    store.claim()
    assert run_job(tmp_path, job) == 0 and store.get(job).state == "finished"


def test_a_job_taken_away_writes_nothing_more(store: JobStore, tmp_path: Path, toy: Callable[..., None]) -> None:
    def taken() -> None:
        store.set_state(job, "queued")
        store.claim("elsewhere/cuda:0")

    job = store.create("toy", TOY)
    store.claim()
    toy(taken)
    assert run_job(tmp_path, job, start=1) == 0
    now = store.get(job)
    assert (now.state, now.starts, now.worker) == ("running", 2, "elsewhere/cuda:0")
    assert [event.step for event in store.events(job, types=["progress"])] == [1, 2]
    names = {path.name for path in (job_folder(tmp_path, job) / "checkpoints").iterdir()}
    assert names == {"step-00000001", "step-00000002"} and not (job_folder(tmp_path, job) / "result.txt").exists()
    with pytest.raises(JobLost, match="started again meanwhile"):
        run_job(tmp_path, job, start=1)


@contextmanager
def locked(data: Path) -> Iterator[None]:
    """Hold the database's write lock, as a copying or hanging program would."""
    holder = sqlite3.connect(data / "library.db", isolation_level=None)
    holder.execute("BEGIN IMMEDIATE")
    try:
        yield
    finally:
        holder.execute("ROLLBACK")
        holder.close()


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Connections that give up on a lock after a tenth of a second."""
    monkeypatch.setattr(database, "BUSY_TIMEOUT_MS", 100)


@pytest.mark.usefixtures("impatient")
def test_a_locked_database_drops_progress_but_no_log_and_no_end(tmp_path: Path) -> None:
    store = JobStore.of(tmp_path)
    job = store.create("toy", {})
    store.claim()
    claim = Claim(store, job, 1, patience=20)
    sink = DatabaseSink(claim, tmp_path)
    with locked(tmp_path):
        sink.emit(Progress(1, 4, 0.5))
        logging = threading.Thread(target=sink.log, args=("kept",))
        logging.start()
        time.sleep(0.3)
    logging.join()
    assert [event.data for event in store.events(job, types=["log"])] == [{"text": "kept"}]
    assert store.events(job, types=["progress"]) == []
    with locked(tmp_path):
        ending = threading.Thread(target=claim.end, args=("finished",))
        ending.start()
        time.sleep(0.3)
    ending.join()
    assert store.get(job).state == "finished"


@pytest.mark.usefixtures("impatient")
def test_an_end_that_cannot_be_written_is_the_worker_s(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(channel, "LEASE", 0.3)
    store = JobStore.of(tmp_path)
    job = store.create("toy", {})
    store.claim()
    with locked(tmp_path), pytest.raises(StoreUnavailable, match="database is locked"):
        Claim(store, job, 1).end("finished")
    assert store.get(job).state == "running"


@pytest.mark.usefixtures("impatient")
def test_a_heartbeat_that_reaches_nobody_stops_training(tmp_path: Path) -> None:
    store = JobStore.of(tmp_path)
    job = store.create("toy", {})
    store.claim()
    control = DatabaseControl(Claim(store, job, 1))
    before = store.get(job).heartbeat or 0.0
    with Heartbeat(control.claim, control.signalled, every=0.02, lease=0.3):
        wait_for(lambda: (store.get(job).heartbeat or 0.0) > before, 5)
        assert not control.should_stop()
        with locked(tmp_path):
            wait_for(control.should_stop, 10)


def test_experts_come_from_the_library_only(tmp_path: Path, base_folders: dict[str, Path]) -> None:
    _, pipe = load(base_folders["sd-v"])
    entry = add_expert(tmp_path, pipe, "robot", 1)
    good = ExpertEntry(entry["sha256"], "robot", "zwx", "robot")
    assert gate_expert(good, tmp_path).phrase == "zwx robot" and gate_expert(good, tmp_path).views is None
    for sha256, words in (("../../x", "SHA-256"), ("0" * 64, "no longer in the library")):
        with pytest.raises(InvalidRequest, match=words):
            gate_expert(ExpertEntry(sha256, "robot"), tmp_path)
    other = lora(tmp_path, pipe, "alien", seed=2)
    shutil.move(other, tmp_path / "experts" / f"{entry['sha256']}.safetensors")
    with pytest.raises(InvalidRequest, match="not the one"):
        gate_expert(good, tmp_path)


@pytest.mark.parametrize("text", ["", ".", "..", "../x", "/etc", "jobs/../../x", "missing"])
def test_folders_outside_are_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "data" / "jobs").mkdir(parents=True)
    (tmp_path / "x").mkdir()
    with pytest.raises(InvalidRequest):
        inside(text, tmp_path / "data")


def test_link_that_leaves_the_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "secret").mkdir()
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "link").symlink_to(tmp_path / "secret")
    with pytest.raises(InvalidRequest):
        inside("link", tmp_path / "data")
    (tmp_path / "data" / "views").mkdir()
    assert inside("views", tmp_path / "data").name == "views"
