"""Jobs from record to result: real tasks on tiny bases, one of them in a real process that is killed."""

from __future__ import annotations

import hashlib
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest

from mole_diffusion import Expert
from mole_diffusion.errors import InvalidRequest
from mole_diffusion.persist import read_composition_header
from tests.tiny import tiny_subject
from tests.training.helpers import load, lora
from tests.training.test_jobs_worker import ended, wait_for
from training.jobs.kinds import gate_expert, inside
from training.jobs.run import DatabaseControl, run_job
from training.jobs.store import Job, JobStore, job_folder
from training.jobs.worker import Timing, Worker
from training.tasks.gate import ExpertEntry

SMALL = {"steps": 3, "batch": 2, "pool": 4, "validation": 2, "validate_every": 3, "self_views": 2, "sample_every": 0}


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
    config["sample_every"] = 3 if kind == "sd-v" else 0
    code, job = run_claimed(store, tmp_path, "gate", config)
    assert (code, job.state) == (0, "finished"), job.reason
    assert job.result is not None and job.result["path"] == f"compositions/{job.id}.safetensors"
    header = read_composition_header(tmp_path / job.result["path"])
    assert [expert["sha256"] for expert in header["experts"]] == [entry["sha256"] for entry in experts]
    folder = job_folder(tmp_path, job.id)
    assert [len(list(made.glob("*.png"))) for made in folder.glob("views-*")] == [2, 2]
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
    assert not list(job_folder(tmp_path, job.id).glob("views-*"))


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


def test_flags_reach_the_loop(store: JobStore) -> None:
    job = store.create("gate", {})
    control = DatabaseControl(store, job)
    assert not (control.should_stop() or control.take_save() or control.take_sample())
    store.request_save(job)
    store.request_sample(job)
    wait_for(control.take_save, 5)
    assert not control.take_save()
    wait_for(control.take_sample, 5)
    control.signalled.stop = True
    assert control.should_stop()


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
