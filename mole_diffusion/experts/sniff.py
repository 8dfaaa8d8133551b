"""Say what a file is that is not safetensors, from its first bytes; nothing is parsed or run."""

from __future__ import annotations

_PICTURES = {b"\x89PNG": "a PNG picture", b"\xff\xd8\xff": "a JPEG picture", b"GIF8": "a GIF picture"}
_ARCHIVES = {b"\x1f\x8b": "a gzip archive", b"7z\xbc\xaf": "a 7z archive", b"Rar!": "a RAR archive"}
_ASK = "Upload the LoRA as a .safetensors file."


def describe_foreign(start: bytes, size: int) -> str:
    """One sentence for a file whose first bytes (up to 4096) are not a safetensors header."""
    if start[:2] == b"PK":
        return (
            "This is a zip archive or a PyTorch file (.pt, .ckpt, .bin), whatever its name says; such files can run "
            f"code and are never opened. {_ASK}"
        )
    if start[:1] == b"\x80" and len(start) > 1 and 0 < start[1] < 6:
        return (
            "This is a Python pickle (.pt, .ckpt, .bin), whatever its name says; pickles can run code and are never "
            f"opened. {_ASK}"
        )
    for signature, kind in {**_PICTURES, **_ARCHIVES}.items():
        if start.startswith(signature):
            return f"This is {kind}, not a LoRA. {_ASK}"
    if start[:4] == b"GGUF":
        return f"This is a GGUF model, not a LoRA. {_ASK}"
    if _is_text(start):
        kind = "a web page" if b"<html" in start[:1024].lower() else "a text file"
        return f"This is {kind}, not a safetensors file: perhaps the download failed. {_ASK}"
    if size < 10:
        return f"The file has only {size} bytes and cannot be a safetensors file: upload it again."
    return f"This is not a safetensors file: its first bytes are not a safetensors header. {_ASK}"


def describe_size(count: int) -> str:
    """Bytes for people: '3.2 MB'."""
    for unit, scale in (("GB", 1024**3), ("MB", 1024**2), ("KB", 1024)):
        if count >= scale:
            return f"{count / scale:.1f} {unit}"
    return f"{count} bytes"


def _is_text(start: bytes) -> bool:
    try:
        text = start[:1024].decode("utf-8")
    except UnicodeDecodeError as error:
        if error.start < min(len(start), 1024) - 4:
            return False
        text = start[: error.start].decode("utf-8")
    return bool(text) and all(character.isprintable() or character in "\r\n\t" for character in text)
