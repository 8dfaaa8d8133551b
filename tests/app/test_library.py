"""The library: what is stored, what is refused and leaves nothing, and what belongs to whom."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from PIL import Image

from app.records import MAX_NAME, MAX_TRIGGER
from app.services import Services
from mole_diffusion.errors import InvalidFile, InvalidRequest
from tests.app.conftest import Files, said
from tests.tiny import cut_out, tiny_lora, tiny_sd


def stored(services: Services) -> list[Path]:
    return sorted((services.settings.data_dir / "experts").iterdir())


def test_the_demo_is_offered_without_any_upload(services: Services) -> None:
    entries = services.library.entries()
    assert [entry.name for entry in entries] == ["bunny", "robot"]
    assert all(entry.builtin and entry.views and entry.trigger for entry in entries)
    assert all("heldout" in entry.views[0].parts for entry in entries)


def test_a_file_becomes_an_entry_in_words(services: Services, files: Files) -> None:
    added = services.library.add(files.bunny, "snow-bunny.safetensors")
    entry = added.entry
    assert not added.known
    assert (entry.name, entry.trigger, entry.family, entry.rank) == ("snow bunny", "pqr bunny", "demo", "4")
    assert entry.sentence.startswith("A LoRA of rank 4 for the demo base, made by ")
    assert entry.sentence.endswith(f"{entry.layers} layers, trigger “pqr bunny”.")
    assert stored(services) == [services.settings.data_dir / "experts" / f"{entry.sha256}.safetensors"]
    assert stored(services)[0].read_bytes() == files.bunny.read_bytes()


def test_the_same_content_is_the_same_entry(services: Services, files: Files, tmp_path: Path) -> None:
    first = services.library.add(files.robot, "a.safetensors").entry
    again = services.library.add(files.robot, "b.safetensors")
    assert again.known
    assert again.entry == first
    assert len(stored(services)) == 1


def test_a_copy_of_a_demo_file_is_recognised(services: Services, demo_assets: Path) -> None:
    added = services.library.add(demo_assets / "demo" / "experts" / "robot.safetensors", "mine.safetensors")
    assert added.known
    assert added.entry.builtin
    assert stored(services) == []


def test_refused_files_say_why_and_leave_nothing(services: Services, files: Files) -> None:
    sentences = set()
    for path, word in files.bad.items():
        with pytest.raises(InvalidFile, match=word) as caught:
            services.library.add(path, path.name)
        sentences.add(str(caught.value))
    assert len(sentences) == len(files.bad)
    assert stored(services) == []
    assert all(entry.builtin for entry in services.library.entries())


def test_equal_triggers_are_pointed_out(services: Services, files: Files) -> None:
    robot = services.library.add(files.robot, "robot.safetensors").entry
    bunny = services.library.add(files.bunny, "bunny2.safetensors").entry
    changed = services.library.update(bunny.sha256, name="other", trigger="QVX Robot", subject_class="")
    assert any(f"“{robot.name}”" in words for words in services.library.warnings(changed))


def test_two_files_of_one_name_get_different_names(services: Services, files: Files) -> None:
    names = [services.library.add(path, "robot.safetensors").entry.name for path in (files.robot, files.bunny)]
    assert names == ["robot 2", "robot 3"]


def test_words_can_be_changed_but_not_those_of_the_demo(services: Services, files: Files) -> None:
    entry = services.library.add(files.robot, "x.safetensors").entry
    changed = services.library.update(entry.sha256, name=" Tin ", trigger="tin man", subject_class="robot")
    assert (changed.name, changed.trigger, changed.subject_class) == ("Tin", "tin man", "robot")
    with pytest.raises(InvalidRequest, match="name"):
        services.library.update(entry.sha256, name=" ", trigger="", subject_class="")
    demo = services.library.entries()[-1]
    with pytest.raises(InvalidRequest, match="demo"):
        services.library.update(demo.sha256, name="mine", trigger="", subject_class="")
    with pytest.raises(InvalidRequest, match="demo"):
        services.library.remove(demo.sha256)


def test_words_are_never_cut_in_silence(services: Services, files: Files, tmp_path: Path) -> None:
    long = tiny_lora(tmp_path / "long.safetensors", tiny_sd(), seed=5, metadata=said("word " * 39 + "robot"))
    entry = services.library.add(long, "n" * 100).entry
    assert entry.trigger == "word " * 39 + "robot"
    assert len(entry.trigger) == MAX_TRIGGER
    fitting = {"name": "n" * MAX_NAME, "trigger": "t" * MAX_TRIGGER, "subject_class": "c" * MAX_NAME}
    changed = services.library.update(entry.sha256, **fitting)
    assert (changed.name, changed.trigger, changed.subject_class) == tuple(fitting.values())
    for field, word in (("name", "name"), ("trigger", "trigger"), ("subject_class", "class")):
        with pytest.raises(InvalidRequest, match=f"The {word} may have {len(fitting[field])} characters"):
            services.library.update(entry.sha256, **{**fitting, field: fitting[field] + "!"})
    assert services.library.get(entry.sha256) == changed


def test_a_file_that_fits_neither_base_of_its_family_is_told_why(services: Services, tmp_path: Path) -> None:
    wrong = tiny_lora(tmp_path / "x.safetensors", tiny_sd(), seed=5, metadata={"ss_base_model_version": "sd_v2"})
    with pytest.raises(InvalidFile, match=r"does not fit Stable Diffusion 2\.1.*modules"):
        services.library.add(wrong, "x.safetensors")


def test_one_visitor_does_not_see_anothers_files(services: Services, files: Files) -> None:
    entry = services.library.add(files.robot, "x.safetensors", owner="ann").entry
    assert entry.sha256 not in {e.sha256 for e in services.library.entries("bob")}
    with pytest.raises(InvalidRequest):
        services.library.load(entry.sha256, "bob")
    services.library.add(files.robot, "y.safetensors", owner="bob")
    services.library.remove(entry.sha256, "ann")
    assert len(stored(services)) == 1, "the file stays while somebody uses it"
    services.library.remove(entry.sha256, "bob")
    assert stored(services) == []


def test_an_expert_carries_the_librarys_words(services: Services, files: Files) -> None:
    entry = services.library.add(files.robot, "x.safetensors").entry
    services.library.update(entry.sha256, name="Tin", trigger="tin man", subject_class="")
    expert = services.library.load(entry.sha256)
    assert (expert.name, expert.trigger, expert.sha256) == ("Tin", "tin man", entry.sha256)


# -- views --------------------------------------------------------------------------------------------------------


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    exif = Image.Exif()
    exif[0x010E] = "where I live"
    path = tmp_path / "photo.jpg"
    cut_out("red").convert("RGB").save(path, exif=exif)
    return path


def test_views_are_stored_without_metadata(services: Services, files: Files, photo: Path) -> None:
    entry = services.library.add(files.robot, "x.safetensors").entry
    seen = services.library.set_views(entry.sha256, pictures=[photo, photo])
    assert len(seen.views) == 2
    for path in seen.views:
        assert b"where I live" not in path.read_bytes()
        with Image.open(path) as picture:
            assert picture.format == "PNG"
            assert not picture.getexif()


def test_transparency_survives(services: Services, files: Files, tmp_path: Path) -> None:
    cut_out("red").save(tmp_path / "cut.png")
    entry = services.library.add(files.robot, "x.safetensors").entry
    view = services.library.set_views(entry.sha256, pictures=[tmp_path / "cut.png"]).views[0]
    with Image.open(view) as picture:
        assert picture.mode == "RGBA"


def huge_png() -> bytes:
    buffer = io.BytesIO()
    Image.new("1", (6000, 6000)).save(buffer, format="PNG")
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("content", "word"), [(huge_png(), "25 million"), (b"GIF89a no", "PNG, JPEG or WebP"), (b"", "PNG, JPEG or WebP")]
)
def test_bad_pictures_are_refused_and_the_old_ones_stay(
    services: Services, files: Files, photo: Path, tmp_path: Path, content: bytes, word: str
) -> None:
    entry = services.library.add(files.robot, "x.safetensors").entry
    services.library.set_views(entry.sha256, pictures=[photo])
    bad = tmp_path / "bad.png"
    bad.write_bytes(content)
    with pytest.raises(InvalidFile, match=word):
        services.library.set_views(entry.sha256, pictures=[photo, bad])
    assert len(services.library.get(entry.sha256).views) == 1


def test_a_damaged_picture_is_refused(services: Services, files: Files, photo: Path, tmp_path: Path) -> None:
    entry = services.library.add(files.robot, "x.safetensors").entry
    half = tmp_path / "half.jpg"
    half.write_bytes(photo.read_bytes()[:700])
    with pytest.raises(InvalidFile, match=r"half\.jpg"):
        services.library.set_views(entry.sha256, pictures=[half])


@pytest.mark.parametrize("count", [0, 7])
def test_one_to_six_pictures_are_taken(services: Services, files: Files, photo: Path, count: int) -> None:
    entry = services.library.add(files.robot, "x.safetensors").entry
    with pytest.raises(InvalidRequest, match="1 and 6"):
        services.library.set_views(entry.sha256, pictures=[photo] * count)
