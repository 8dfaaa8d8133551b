"""A new subject from the page: pictures in, an expert in the library, and nothing kept of what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from app.services import Services
from app.subjects import SubjectRecipe
from mole_diffusion.errors import InvalidRequest
from tests.tiny import cut_out
from training.jobs.run import run_job
from training.jobs.store import JobStore

RECIPE = SubjectRecipe("demo", "qvx", "cup", steps=2, rank=2)


@pytest.fixture
def store(services: Services) -> JobStore:
    return JobStore.of(services.settings.data_dir)


@pytest.fixture
def pictures(tmp_path: Path) -> list[Path]:
    paths = [tmp_path / f"{number}.png" for number in range(4)]
    for number, path in enumerate(paths):
        cut_out("#d02020", turn=20.0 * number).save(path)
    return paths


def kept(services: Services) -> list[Path]:
    return list((services.settings.data_dir / "jobs").glob("*"))


@pytest.mark.parametrize("adapter", [pytest.param("lora", marks=pytest.mark.long), "moslora"])
def test_pictures_become_an_expert_of_the_library_once(
    services: Services, store: JobStore, pictures: list[Path], adapter: str
) -> None:
    recipe = SubjectRecipe("demo", "qvx", "cup", adapter, steps=2, rank=2)
    job, _ = services.subjects.train(pictures, recipe, "ann")
    assert services.subjects.collect("ann") == []
    claimed = store.claim()
    assert claimed is not None and claimed.id == job
    assert run_job(services.settings.data_dir, job) == 0, store.get(job).reason
    assert services.subjects.collect("bob") == []
    (name,) = services.subjects.collect("ann")
    entry = services.library.entries("ann")[0]
    assert (entry.name, entry.trigger, entry.subject_class, entry.family) == (name, "qvx cup", "cup", "demo")
    assert len(entry.views) == 4 and services.subjects.collect("ann") == []
    services.library.remove(entry.sha256, "ann")
    assert services.subjects.collect("ann") == [] and entry.sha256 not in [
        item.sha256 for item in services.library.entries("ann")
    ]


def test_stored_pictures_carry_no_metadata(services: Services, tmp_path: Path) -> None:
    path = tmp_path / "photo.jpg"
    exif = Image.Exif()
    exif[0x010E] = "where I live"
    Image.new("RGB", (64, 64), "#d02020").save(path, exif=exif)
    _, warnings = services.subjects.train([path], RECIPE)
    (folder,) = kept(services)
    (stored,) = (folder / "pictures").iterdir()
    assert b"where I live" not in stored.read_bytes() and "1 pictures were given" in warnings[0]


@pytest.mark.parametrize(
    ("recipe", "sentence"),
    [
        (SubjectRecipe("demo", "qvx", " "), "plain word"),
        (SubjectRecipe("demo", "", "cup"), "needs a token"),
        (SubjectRecipe("/etc", "qvx", "cup"), "The base is one of"),
        (SubjectRecipe("demo", "qvx", "cup", "dora"), "The adapter is one of"),
        (SubjectRecipe("demo", "qvx", "cup", preset="9gb"), "Expected a preset"),
        (SubjectRecipe("demo", "qvx", "cup", steps=-4), "steps is between"),
    ],
)
def test_what_is_refused_leaves_nothing(
    services: Services, store: JobStore, pictures: list[Path], recipe: SubjectRecipe, sentence: str
) -> None:
    with pytest.raises(InvalidRequest, match=sentence):
        services.subjects.train(pictures, recipe)
    assert kept(services) == [] and store.list() == []


def test_bad_pictures_are_refused_with_a_sentence(services: Services, store: JobStore, tmp_path: Path) -> None:
    broken = tmp_path / "broken.jpg"
    broken.write_bytes(b"\xff\xd8\xff\xe0" + b"0" * 100)
    for pictures, sentence in (([], "between 1 and 40"), ([broken], "broken.jpg"), ([broken] * 41, "41 came")):
        with pytest.raises(InvalidRequest, match=sentence):
            services.subjects.train(pictures, RECIPE)
    assert kept(services) == [] and store.list() == []


def test_a_removed_job_takes_its_pictures_along(services: Services, store: JobStore, pictures: list[Path]) -> None:
    job, _ = services.subjects.train(pictures, RECIPE, "ann")
    with pytest.raises(InvalidRequest, match="no such job"):
        services.jobs.remove(job, "bob")
    with pytest.raises(InvalidRequest, match="cancel it before"):
        services.jobs.remove(job, "ann")
    services.jobs.cancel(job, "ann")
    services.jobs.remove(job, "ann")
    assert kept(services) == [] and store.list() == []
