"""What a LoRA's header says about itself: trigger words, base family, title, role.

No standard exists. Everything here is a stranger's text: lengths are bounded, nothing is trusted to be well-formed.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from mole_diffusion.experts.canonical import ROLES, LowRank, Role
from mole_diffusion.experts.numbers import as_finite
from mole_diffusion.experts.safefile import Source

_WIDTHS = {768: "sd1", 1024: "sd21", 2048: "sdxl"}
_MAX_TEXT = 200
SIDECAR = "activation text"
_MAX_SIDECAR = 2**20


def trigger_words(metadata: Mapping[str, str]) -> str | None:
    """modelspec.trigger_phrase, the commonest tag of ss_tag_frequency, what stands beside the file, or the folder names
    of kohya's data; in this order.
    """
    phrase = _clean(metadata.get("modelspec.trigger_phrase")) or _commonest_tag(metadata.get("ss_tag_frequency"))
    return phrase or _clean(metadata.get(SIDECAR)) or _folder(metadata.get("ss_dataset_dirs"))


def sidecar(source: Source) -> dict[str, str]:
    """The "activation text" of ``<stem>.json`` beside a file, as model managers of A1111 write it; as header entry."""
    if isinstance(source, bytes):
        return {}
    path = Path(source).with_suffix(".json")
    try:
        if not path.is_file() or path.stat().st_size > _MAX_SIDECAR:
            return {}
        content = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}  # it may be anybody's file and say anything: then it says nothing about triggers
    text = content.get(SIDECAR) if isinstance(content, dict) else None
    return {SIDECAR: text} if isinstance(text, str) else {}


def base_family(metadata: Mapping[str, str], modules: Mapping[str, LowRank]) -> str | None:
    """Family from the metadata, else from the width of the text states that cross-attention reads; None = unknown."""
    return _family_from_metadata(metadata) or family_from_modules(modules)


def family_from_modules(modules: Mapping[str, LowRank]) -> str | None:
    """sd1, sd21 or sdxl by cross-attention width (768, 1024, 2048)."""
    for key, pair in modules.items():
        if key.endswith((".attn2.to_k", ".attn2.to_v")):
            return _WIDTHS.get(pair.weight_shape[1])
    return "sdxl" if any(key.startswith("text_encoder_2.") for key in modules) else None


def title(metadata: Mapping[str, str]) -> str | None:
    """The file's own title."""
    return _clean(metadata.get("modelspec.title")) or _clean(metadata.get("ss_output_name"))


def role(metadata: Mapping[str, str]) -> Role:
    """The role that our own training wrote, subject otherwise."""
    stated = metadata.get("mole.role")
    return stated if stated in ROLES else "subject"  # pyright: ignore[reportReturnType]


def producer(metadata: Mapping[str, str], layout: str) -> str:
    """Which program wrote the file, as far as it can be told."""
    if "mole.schema" in metadata or "mole.base" in metadata:
        return "MoLE Diffusion"
    if any(key.startswith("ot_") for key in metadata):
        return "OneTrainer"
    if any(key.startswith("ss_") for key in metadata):
        return "kohya-ss"
    return "diffusers" if layout == "diffusers" else f"{layout} layout"


def _family_from_metadata(metadata: Mapping[str, str]) -> str | None:
    if own := _clean(metadata.get("mole.base")):
        return own
    version = metadata.get("ss_base_model_version", "").lower()
    architecture = metadata.get("modelspec.architecture", "").lower()
    if version.startswith("sdxl") or "xl" in architecture:
        return "sdxl"
    if version.startswith("sd_v2") or "stable-diffusion-v2" in architecture:
        return "sd21"
    return "sd1" if version.startswith("sd_v1") or "stable-diffusion-v1" in architecture else None


def _commonest_tag(text: str | None) -> str | None:
    tags: dict[str, float] = {}
    for folder in _values(text):
        for tag, count in folder.items() if isinstance(folder, dict) else ():
            if (number := as_finite(count)) is not None and (clean := _clean(tag)):
                tags[clean] = tags.get(clean, 0) + number
    return max(tags, key=lambda tag: tags[tag]) if tags else None


def _folder(text: str | None) -> str | None:
    """kohya names its image folders '<repeats>_<trigger> <class>'."""
    try:
        folders = json.loads(text or "{}")
    except (ValueError, RecursionError):
        return None
    for name in folders if isinstance(folders, dict) else ():
        if match := re.fullmatch(r"\d+_(.+)", name):
            return _clean(match[1])
    return None


def _values(text: str | None) -> Iterable[Any]:
    try:
        content = json.loads(text or "{}")
    except (ValueError, RecursionError):
        return ()
    return content.values() if isinstance(content, dict) else ()


def _clean(text: str | None) -> str | None:
    if not isinstance(text, str):
        return None
    printable = "".join(character if character.isprintable() else " " for character in text[:_MAX_TEXT])
    return " ".join(printable.split()) or None
