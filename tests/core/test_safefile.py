"""Hostile and broken files: each is refused by its content, with a sentence of its own."""

from __future__ import annotations

import io
import json
import pickle
import struct
import time
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save

from mole_diffusion.errors import InvalidFile
from mole_diffusion.experts import Expert, inspect_file
from mole_diffusion.experts.safefile import MAX_TENSORS, read_header, read_tensors

GOOD = save(
    {"unet.conv_in.lora_A.weight": torch.ones(2, 4, 3, 3), "unet.conv_in.lora_B.weight": torch.ones(8, 2, 1, 1)}
)


def raw(header: bytes | dict[str, Any], data: bytes = b"") -> bytes:
    """A safetensors file with any header."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def entry(shape: list[int], first: int, last: int, dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [first, last]}


def zipped() -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        archive.writestr("archive/data.pkl", b"\x80\x02.")
    return stream.getvalue()


class Bomb:
    """Runs code where it is unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return exec, ("raise SystemExit('unpickled')",)


FOREIGN = {
    "empty": (b"", "empty"),
    "text": (b"<!doctype nothing> hello, this is a README\n" * 3, "text file"),
    "utf-8 text": ("Füße und Straße, sehr schön\n".encode() * 300, "text file"),
    "web page": (b"<!DOCTYPE html><html><body>404</body></html>", "web page"),
    "pickle": (pickle.dumps(Bomb()), "pickle"),
    "old pickle": (pickle.dumps({"a": 1}, protocol=2), "pickle"),
    "zip": (zipped(), "zip archive or a PyTorch file"),
    "picture": (b"\x89PNG\r\n\x1a\n" + b"\x00" * 90, "PNG picture"),
    "gguf": (b"GGUF" + b"\x03\x00\x00\x00" * 20, "GGUF"),
    "gzip": (b"\x1f\x8b\x08" + bytes(80), "gzip"),
    "tiny": (b"\x01\x02\x03", "only 3 bytes"),
    "noise": (bytes(range(128, 256)) * 4, "first bytes"),
    "cut in header": (GOOD[:40], "cut off inside its header"),
    "cut in data": (GOOD[:-8], "cut off"),
    "trailing": (GOOD + b"\x00" * 8, "after its last tensor"),
    "not json": (raw(b"{nope nope}"), "not valid JSON"),
    "deep json": (raw(b'{"a":' + b"[" * 200_000 + b"}"), "not valid JSON"),
    "list of tensors": (raw({"a": [1]}), "malformed"),
    "metadata not strings": (raw({"__metadata__": {"a": 1}}), "metadata"),
    "bad dtype": (raw({"a": entry([1], 0, 1, "I8")}, b"\x00"), "stored as I8"),
    "boolean shape": (raw({"a": entry([True], 0, 4)}, bytes(4)), "malformed"),
    "negative shape": (raw({"a": entry([-1], 0, 4)}, bytes(4)), "malformed"),
    "many dimensions": (raw({"a": entry([1] * 9, 0, 4)}, bytes(4)), "malformed"),
    "wrong size": (raw({"a": entry([2], 0, 4)}, bytes(4)), "as its shape needs"),
    "overlap": (raw({"a": entry([1], 0, 4), "b": entry([1], 0, 4)}, bytes(4)), "overlap"),
    "gap": (raw({"a": entry([1], 0, 4), "b": entry([1], 8, 12)}, bytes(12)), "overlap or leave gaps"),
    "huge number": (
        raw(b'{"a":{"dtype":"F32","shape":[' + b"9" * 9000 + b'],"data_offsets":[0,4]}}'),
        "not valid JSON",
    ),
    "duplicate": (raw(b"{" + b'"a":{"dtype":"F32","shape":[0],"data_offsets":[0,0]},' * 2 + b'"c":1}'), "twice"),
}


@pytest.mark.parametrize("case", FOREIGN)
def test_refused_with_its_own_sentence(case: str, tmp_path: Path) -> None:
    content, part = FOREIGN[case]
    path = tmp_path / "innocent.safetensors"
    path.write_bytes(content)
    for source in (path, content):
        with pytest.raises(InvalidFile, match=part):
            read_header(source)
        with pytest.raises(InvalidFile, match=part):
            Expert.load(source)
    result = inspect_file(path)
    assert not result.ok and part in result.sentence() and result.size == len(content)


def test_sentences_differ() -> None:
    sentences = set()
    for case in ("empty", "text", "pickle", "zip", "cut in data", "cut in header", "duplicate"):
        sentences.add(inspect_file(FOREIGN[case][0]).reason)
    assert len(sentences) == 7


def test_good_file() -> None:
    header = read_header(GOOD)
    assert header.shape("unet.conv_in.lora_A.weight") == (2, 4, 3, 3) and header.size == len(GOOD)
    assert read_tensors(GOOD)["unet.conv_in.lora_B.weight"].shape == (8, 2, 1, 1)


def test_header_length_byte_that_looks_like_a_pickle() -> None:
    """A header of 0x0280 bytes starts like a pickle of protocol 2 and is a good file all the same."""
    text = json.dumps({"a": entry([1], 0, 4)}).encode().ljust(0x0280)
    assert read_header(raw(text, bytes(4))).shape("a") == (1,)


def test_900_000_tensors_are_refused_fast() -> None:
    body = b",".join(b'"%d":{"dtype":"F32","shape":[0],"data_offsets":[0,0]}' % i for i in range(900_000))
    start = time.process_time()
    with pytest.raises(InvalidFile, match="header"):
        read_header(raw(b"{" + body + b"}"))
    assert time.process_time() - start < 1.0


def test_too_many_tensors_in_a_small_header() -> None:
    content = {str(index): entry([0], 0, 0) for index in range(MAX_TENSORS + 1)}
    with pytest.raises(InvalidFile, match="10,001 tensors"):
        read_header(raw(content))


def test_long_metadata_is_refused() -> None:
    with pytest.raises(InvalidFile, match="header"):
        read_header(raw({"__metadata__": {"a": "x" * (9 * 1024 * 1024)}}))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite(value: float) -> None:
    bad = save(
        {"unet.conv_in.lora_A.weight": torch.full((2, 4), value), "unet.conv_in.lora_B.weight": torch.ones(8, 2)}
    )
    with pytest.raises(InvalidFile, match="NaN or infinity"):
        Expert.load(bad)


def test_size_limit() -> None:
    with pytest.raises(InvalidFile, match="at most 16 bytes"):
        read_header(GOOD, max_bytes=16)


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(InvalidFile, match=r"Cannot read 'no\.safetensors'"):
        Expert.load(tmp_path / "no.safetensors")
    assert not inspect_file(tmp_path / "no.safetensors").ok
    assert not inspect_file(tmp_path).ok


NOT_LORA = {
    "checkpoint": (
        {"model.diffusion_model.input_blocks.0.0.weight": 2, "first_stage_model.a": 1},
        "full model checkpoint",
    ),
    "unet": ({"down_blocks.0.resnets.0.conv1.weight": 2, "up_blocks.0.resnets.0.conv1.weight": 2}, "a full UNet"),
    "prefixed unet": ({"unet.down_blocks.0.resnets.0.conv1.weight": 2}, "a full UNet"),
    "text encoder": ({"text_model.encoder.layers.0.mlp.fc1.weight": 2}, "a text encoder"),
    "vae": ({"decoder.conv_in.weight": 2, "encoder.down_blocks.0.weight": 2}, "a VAE"),
    "embedding": ({"emb_params": 2}, "textual-inversion"),
    "sdxl embedding": ({"clip_l": 2, "clip_g": 2}, "textual-inversion"),
    "anything": ({"weights": 2}, "not a LoRA"),
    "dora": ({"lora_unet_conv_in.lora_down.weight": 2, "lora_unet_conv_in.dora_scale": 2}, "not understood"),
    "loha with dora": ({"lora_unet_conv_in.hada_w1_a": 2, "lora_unet_conv_in.dora_scale": 2}, "not understood"),
    "peft dora": ({"unet.conv_in.lora_magnitude_vector": 2}, "not understood"),
    "bundle": ({"bundle_emb.tok.clip_l": 2, "lora_unet_conv_in.alpha": 1}, "1 of 2 tensors"),
    "bundle alone": ({"bundle_emb.tok.clip_l": 2}, "read beside it"),
    "moslora": ({"unet.conv_in.lora_A.weight": 2, "unet.conv_in.lora_AB.weight": 2}, "MoSLoRA"),
    "flux": ({"transformer.x.lora_A.weight": 2}, "Flux"),
    "nothing": ({}, "no tensors"),
}


@pytest.mark.parametrize("case", NOT_LORA)
def test_safetensors_that_are_not_a_usable_lora(case: str) -> None:
    shapes, part = NOT_LORA[case]
    content = save({key: torch.ones(2, size) for key, size in shapes.items()})
    with pytest.raises(InvalidFile, match=part):
        Expert.load(content)


def test_random_damage_is_always_refused_with_a_sentence_or_harmless() -> None:
    """Whatever bytes change, nothing but InvalidFile comes out."""
    random = torch.Generator().manual_seed(0)
    for _ in range(400):
        data = bytearray(GOOD)
        for _ in range(int(torch.randint(1, 6, (1,), generator=random))):
            place = int(torch.randint(0, len(data), (1,), generator=random))
            data[place] = int(torch.randint(0, 256, (1,), generator=random))
        try:
            Expert.load(bytes(data))
        except InvalidFile as error:
            assert len(str(error)) > 20
