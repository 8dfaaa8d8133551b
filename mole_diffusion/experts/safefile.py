"""Read safetensors files that strangers wrote: the header is checked in full before any tensor is touched.

The safetensors library accepts 900,000 empty tensors, 95 MB of metadata, duplicate keys and NaN. This reader does not.
Nothing is ever unpickled.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from mole_diffusion.errors import InvalidFile
from mole_diffusion.experts.sniff import describe_foreign, describe_size

if TYPE_CHECKING:
    from torch import Tensor

Source = str | Path | bytes

MAX_HEADER = 8 * 1024 * 1024
MAX_TENSORS = 10_000
MAX_BYTES = 2 * 1024**3
MAX_DIMENSIONS = 5
ITEM_SIZES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}


@dataclass(frozen=True)
class Header:
    """What a safetensors file says about itself.

    Attributes:
        tensors: name → (dtype, shape).
        metadata: the file's string metadata.
        size: bytes of the whole file.
        places: name → position of the tensor's first byte in the file.
    """

    tensors: Mapping[str, tuple[str, tuple[int, ...]]]
    metadata: Mapping[str, str] = field(default_factory=dict)
    size: int = 0
    places: Mapping[str, int] = field(default_factory=dict)

    def shape(self, key: str) -> tuple[int, ...]:
        """Shape of one tensor."""
        return self.tensors[key][1]


def read_header(source: Source, *, max_bytes: int | None = None) -> Header:
    """Read and check the header of a safetensors file.

    Args:
        source: a path, or the file's bytes.
        max_bytes: refuse larger files; None leaves the size to the caller (the header alone is always cheap to read).

    Raises:
        InvalidFile: not safetensors (says what it is instead), damaged, or over a limit.
    """
    with _open(source) as stream:
        size = stream.seek(0, 2)
        stream.seek(0)
        start = stream.read(4096)
        length = _header_length(start, size)
        stream.seek(8)
        header = _parse(stream.read(length), size, data_start=8 + length)
    if max_bytes is not None and size > max_bytes:
        raise InvalidFile(
            f"Expected at most {describe_size(max_bytes)}, but this file has {describe_size(size)}: "
            "upload the LoRA alone, without the model it was trained on."
        )
    return header


def read_tensors(source: Source, *, max_bytes: int = MAX_BYTES) -> dict[str, Tensor]:
    """Every tensor of a checked file, on the CPU, in the file's own dtypes; all values are finite.

    Raises:
        InvalidFile: as :func:`read_header`, or a tensor holds NaN or infinity.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load

    data = read_bytes(source, max_bytes=max_bytes)
    read_header(data, max_bytes=max_bytes)
    try:
        tensors = load(data)
    except SafetensorError as error:
        raise InvalidFile(f"This safetensors file is damaged ({error}): export or download it again.") from error
    for name, tensor in tensors.items():
        if not bool(tensor.isfinite().all()):
            raise InvalidFile(
                f"The tensor {name!r} holds NaN or infinity, so the file cannot be used: its training diverged."
            )
    return tensors


def read_outline(source: Source, *, values: str) -> dict[str, Tensor]:
    """Every tensor of a checked file as its shape alone, on the meta device; one-number tensors whose name ends in
    ``values`` with their number. However large the file is, nothing else of it is read.

    Raises:
        InvalidFile: as :func:`read_header`, or such a number is NaN or infinite.
    """
    import torch

    dtypes = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
    header = read_header(source)
    outline: dict[str, Tensor] = {}
    with _open(source) as stream:
        for name, (dtype, shape) in header.tensors.items():
            if not name.endswith(values) or math.prod(shape) != 1:
                outline[name] = torch.empty(shape, dtype=dtypes[dtype], device="meta")
                continue
            stream.seek(header.places[name])
            number = torch.frombuffer(bytearray(stream.read(ITEM_SIZES[dtype])), dtype=dtypes[dtype])
            if not bool(number.isfinite()):
                raise InvalidFile(f"The tensor {name[:80]!r} holds NaN or infinity: its training diverged.")
            outline[name] = number.reshape(shape)
    return outline


def read_bytes(source: Source, *, max_bytes: int = MAX_BYTES) -> bytes:
    """The file's content, read once, after its header and size have been checked."""
    read_header(source, max_bytes=max_bytes)
    return source if isinstance(source, bytes) else Path(source).read_bytes()


def _open(source: Source) -> BinaryIO:
    if isinstance(source, bytes):
        return BytesIO(source)
    try:
        return Path(source).open("rb")
    except OSError as error:
        raise InvalidFile(f"Cannot read {Path(source).name!r}: {error.strerror or error}.") from error


def _header_length(start: bytes, size: int) -> int:
    """Length of the JSON header; every other kind of file leaves here with a sentence of its own."""
    if size == 0:
        raise InvalidFile("The file is empty: upload it again.")
    length = int.from_bytes(start[:8], "little")
    if len(start) > 8 and start[8:9] == b"{" and length >= 2:
        if length > MAX_HEADER and length + 8 <= size:
            raise InvalidFile(
                f"The header of this safetensors file has {describe_size(length)}, but a LoRA's header never needs "
                f"more than {describe_size(MAX_HEADER)}: refused."
            )
        if length + 8 <= size:
            return length
        if length <= 100 * 1024 * 1024:
            raise InvalidFile("This safetensors file is cut off inside its header: download or copy it again.")
    raise InvalidFile(describe_foreign(start, size))


def _parse(raw: bytes, size: int, data_start: int) -> Header:
    try:
        content = json.loads(raw.decode("utf-8"), object_pairs_hook=_no_duplicates)
    except (ValueError, RecursionError) as error:
        raise InvalidFile("The header of this safetensors file is not valid JSON: the file is damaged.") from error
    if not isinstance(content, dict):
        raise InvalidFile("The header of this safetensors file is not a JSON object: the file is damaged.")
    metadata = content.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise InvalidFile("The metadata of this safetensors file must be strings: the file is damaged.")
    if len(content) > MAX_TENSORS:
        raise InvalidFile(
            f"The file declares {len(content):,} tensors, but a LoRA has at most {MAX_TENSORS:,}: refused."
        )
    spans: list[tuple[int, int]] = []
    tensors = {name: _entry(name, entry, spans) for name, entry in content.items()}
    _check_layout(spans, size - data_start)
    places = {name: data_start + first for name, (first, _) in zip(tensors, spans, strict=True)}
    return Header(tensors, metadata, size, places)


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) != len(pairs):
        seen: set[str] = set()
        double = next(key for key, _ in pairs if key in seen or seen.add(key))
        raise InvalidFile(f"The header of this safetensors file names {double[:80]!r} twice: refused as tampered with.")
    return content


def _entry(name: str, entry: Any, spans: list[tuple[int, int]]) -> tuple[str, tuple[int, ...]]:
    """Check one tensor's declaration and note where its bytes lie."""
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise InvalidFile(f"The header entry of {name[:80]!r} is malformed: the file is damaged.")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in ITEM_SIZES:
        raise InvalidFile(
            f"The tensor {name[:80]!r} is stored as {str(dtype)[:20]}, expected one of {', '.join(ITEM_SIZES)}: "
            "quantised or integer LoRAs are not supported, convert it to fp16 first."
        )
    if not _naturals(shape) or not _naturals(offsets) or len(offsets) != 2 or len(shape) > MAX_DIMENSIONS:
        raise InvalidFile(f"The shape or position of {name[:80]!r} is malformed: the file is damaged.")
    if offsets[1] - offsets[0] != math.prod(shape) * ITEM_SIZES[dtype]:
        raise InvalidFile(f"The tensor {name[:80]!r} does not have as many bytes as its shape needs: file damaged.")
    spans.append((offsets[0], offsets[1]))
    return dtype, tuple(shape)


def _naturals(value: Any) -> bool:
    return isinstance(value, list) and all(type(item) is int and 0 <= item < 2**48 for item in value)


def _check_layout(spans: list[tuple[int, int]], data_bytes: int) -> None:
    """Tensors must fill the data part exactly, without gaps and overlaps."""
    end = 0
    for first, last in sorted(spans):
        if first != end:
            raise InvalidFile("Tensors of this safetensors file overlap or leave gaps: the file is damaged.")
        end = last
    if end > data_bytes:
        raise InvalidFile(
            f"This safetensors file is cut off: {describe_size(end - data_bytes)} of its tensors are missing. "
            "Download or copy it again."
        )
    if end < data_bytes:
        raise InvalidFile("This safetensors file has bytes after its last tensor: refused as damaged.")
