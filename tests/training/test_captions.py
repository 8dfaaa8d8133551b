"""Captions: from files, with the trigger, made by a model; and what they do to training pictures."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from PIL import Image

from mole_diffusion.errors import InvalidRequest
from tests.tiny import cut_out
from tests.training.helpers import load
from training.build.subject import CAPTIONS, build_subject, photo_captions
from training.data.captioner import Captioner, load_captioner
from training.data.captions import names_a_side, read_captions, with_trigger, write_captions
from training.data.pictures import check_pictures
from training.data.subjects import Subject
from training.data.views import view_pool
from training.tasks.subject import SubjectConfig


def photos(folder: Path, *names: str) -> Path:
    for number, name in enumerate(names):
        picture = Image.new("RGB", (64, 64), (40 * number, 90, 30))
        picture.paste("white", (4 + 9 * number, 8, 30 + 9 * number, 40))
        picture.save(folder / name)
    return folder


def config(**options: object) -> SubjectConfig:
    return SubjectConfig.of(None, **{"base": "demo", "token": "zwx", "class": "robot", **options})


def test_files_beside_the_pictures(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes("\ufeffa robot\n on a table ".encode())
    (tmp_path / "b.txt").write_text("  \n")
    lines = [{"file_name": "c.png", "text": "ein Roboter, grün"}, {"file_name": "a.png", "text": "not this one"}]
    (tmp_path / "metadata.jsonl").write_text("\n".join(json.dumps(line) for line in lines), encoding="utf-8")
    found = read_captions(tmp_path, ["a.png", "b.png", "c.png", "d.png"])
    assert found == {"a.png": "a robot on a table", "c.png": "ein Roboter, grün"}
    write_captions(tmp_path / "again" / "metadata.jsonl", found)
    assert read_captions(tmp_path / "again", ["a.png", "c.png"]) == found


@pytest.mark.parametrize(
    ("name", "data", "words"),
    [
        ("a.txt", "grün".encode("latin-1"), "a.txt is not UTF-8"),
        ("a.txt", b"x" * 501, "a.png has 501 characters; shorten"),
        ("a.txt", b"x" * 2**21, "larger than 1 MB"),
        ("metadata.jsonl", b'{"file_name": "a.png"}', "Line 1 of metadata.jsonl is not"),
        ("metadata.jsonl", b'{"file_name": "a.png", "text": "x"}\n[' * 1, "Line 2 of metadata.jsonl is not"),
    ],
)
def test_bad_files_are_named(tmp_path: Path, name: str, data: bytes, words: str) -> None:
    (tmp_path / name).write_bytes(data)
    with pytest.raises(InvalidRequest, match=words):
        read_captions(tmp_path, ["a.png"])


@pytest.mark.parametrize(
    ("caption", "named"),
    [
        ("a zwx robot waves", "a zwx robot waves"),
        ("A ZWX waves", "A ZWX waves"),
        ("an old robot waves", "an old zwx robot waves"),
        ("the robot waves to a robot", "the robot waves to a zwx robot"),
        ("robots wave", "a zwx robot, robots wave"),
        ("a tin man", "a zwx robot, a tin man"),
        ("", "a zwx robot"),
    ],
)
def test_trigger_is_put_in(caption: str, named: str) -> None:
    assert with_trigger(caption, "zwx", "robot") == named


def test_article_follows_the_trigger() -> None:
    assert with_trigger("an alien", "zwx", "alien") == "a zwx alien"
    assert with_trigger("mug (red)", "sks", "mug (red)") == "sks mug (red)"


def test_captions_are_shown_kept_and_editable(tmp_path: Path) -> None:
    folder, work, said = photos(tmp_path, "a.png", "b.png"), tmp_path / "work", []
    cut_out("red").save(tmp_path / "c.png")
    for name in "ac":
        (tmp_path / f"{name}.txt").write_text("a robot on a table")
    found = check_pictures(folder)
    captions = photo_captions(config(), found, folder, work, said.append)
    assert captions == ("a zwx robot on a table", None, None)
    assert said == [
        "Captions of cut-outs are not used, for their backgrounds are drawn anew: c.png.",
        "a.png: a zwx robot on a table",
    ]
    assert read_captions(work, ["a.png"], CAPTIONS) == {"a.png": "a zwx robot on a table"}
    assert photo_captions(config(captions="off"), found, folder, work, said.append) == ()
    write_captions(work / CAPTIONS, {"b.png": "edited"})  # nothing is left for a model to describe
    made = photo_captions(config(captions="auto"), found, folder, work, said.append)
    assert made == ("a zwx robot on a table", "a zwx robot, edited", None)


def test_a_captioner_that_is_not_there_is_named(tmp_path: Path) -> None:
    folder = photos(tmp_path, "a.png")
    with pytest.raises(InvalidRequest, match="neither on this machine nor on the model hub: connect"):
        photo_captions(config(captions="auto"), check_pictures(folder), folder, None, print)


def test_captioner_on_a_tiny_blip(tmp_path: Path) -> None:
    tiny_blip(tmp_path)
    captioner = load_captioner(tmp_path)
    pictures = [Image.new("RGB", (40, 30), "red"), cut_out("blue"), *[Image.new("RGB", (9, 9))] * 3]
    captions = captioner(pictures)
    assert captions == captioner(pictures) and len(captions) == 5 and captions[2] == captions[4]
    assert {word for caption in captions for word in caption.split()} <= {"[DEC]", *"abcdefgh"}
    (tmp_path / "model.safetensors").rename(tmp_path / "pytorch_model.bin")
    with pytest.raises(InvalidRequest, match="found neither"):  # nothing is unpickled
        load_captioner(tmp_path)


def tiny_blip(folder: Path) -> Captioner:
    from transformers import BertTokenizer, BlipConfig, BlipForConditionalGeneration, BlipImageProcessor, BlipProcessor

    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "[DEC]", *"abcdefgh"]
    tokenizer = BertTokenizer(vocab={word: number for number, word in enumerate(words)})
    shape = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = {"vocab_size": len(words), "encoder_hidden_size": 16, "max_position_embeddings": 64}
    ends = {"bos_token_id": 5, "eos_token_id": 3, "sep_token_id": 3, "pad_token_id": 0}
    vision = {**shape, "image_size": 32, "patch_size": 16}
    torch.manual_seed(0)
    model = BlipForConditionalGeneration(
        BlipConfig(text_config={**shape, **text, **ends}, vision_config=vision, projection_dim=16)
    )
    processor = BlipProcessor(BlipImageProcessor(size={"height": 32, "width": 32}), tokenizer)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return Captioner(model, processor)


def test_a_caption_with_a_side_is_never_mirrored(base_folders: dict[str, Path]) -> None:
    assert names_a_side("its Left hand") and not names_a_side("a leftover, bright")
    base, pipe = load(base_folders["sd-v"])
    view = Image.new("RGB", (64, 64), "black")
    view.paste("white", (0, 0, 20, 64))
    for caption, different in (("a zwx robot looks left", 1), ("a zwx robot", 2)):
        subject = Subject("robot", "zwx robot", (view,) * 8, (caption,) * 8)
        pool = view_pool(pipe, base, subject, 64, 99, 0, flip=True)
        assert set(pool.captions) == {caption} and len(pool.captions) == 32
        assert len({tuple(row.flatten().tolist()) for row in pool.latents.round(decimals=4)}) == different


def test_building_says_what_is_odd(base_folders: dict[str, Path], tmp_path: Path) -> None:
    folder, said = photos(tmp_path, "a.png", "b.png"), []
    (tmp_path / "a.txt").write_text("a robot " + "very " * 40 + "far away")
    settings = config(base=str(base_folders["sd-v"]), rank=2, batch=1, pool=2, steps=1)
    task = build_subject(settings, folder, tmp_path / "work", said.append)
    assert said[0] == "2 pictures were given; 4 to 20 different ones usually serve best."
    assert said[-1].startswith("The text encoder does not read the end of a caption: “very")
    assert set(task.pool.captions) == {
        "a photo of a zwx robot",
        read_captions(tmp_path / "work", ["a.png"], CAPTIONS)["a.png"],
    }
