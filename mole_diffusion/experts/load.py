"""From a file to an expert."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from pathlib import Path

from mole_diffusion.errors import InvalidFile
from mole_diffusion.experts import metadata as about
from mole_diffusion.experts.canonical import Expert, Role
from mole_diffusion.experts.formats import Converted
from mole_diffusion.experts.names import ModuleShapes, Resolver
from mole_diffusion.experts.peft_folder import WEIGHTS, config_beside, weights_of
from mole_diffusion.experts.recognise import recognise, refuse_unmatched
from mole_diffusion.experts.safefile import Header, Source, read_bytes, read_header, read_tensors


@dataclass(frozen=True)
class Opened:
    """A file that was read, before anybody decided whether it is usable as an expert."""

    header: Header
    layout: str
    converted: Converted
    sha256: str


def open_lora(source: Source, shapes: ModuleShapes | None = None) -> Opened:
    """Read and convert a file without judging what it left over.

    Names that the base does not have are read by the grammar instead, so that a LoRA of another base is reported as
    such and not as gibberish.

    Raises:
        InvalidFile: as :func:`load_expert`, but not for unmatched keys.
    """
    source = weights_of(source)
    beside = config_beside(source)
    recognise(read_header(source))
    data = read_bytes(source)
    header = read_header(data)
    header = replace(header, metadata={**header.metadata, **beside})
    layout = recognise(header)
    tensors = read_tensors(data)
    converted = layout.convert(tensors, header, Resolver(shapes))
    if shapes is not None and converted.unmatched:
        plain = layout.convert(tensors, header, Resolver())
        converted = converted if plain.unmatched else plain
    return Opened(header, layout.NAME, converted, hashlib.sha256(data + "".join(beside.values()).encode()).hexdigest())


def load_expert(
    source: Source,
    *,
    name: str | None = None,
    trigger: str | None = None,
    role: Role | None = None,
    shapes: ModuleShapes | None = None,
) -> Expert:
    """See :meth:`mole_diffusion.experts.Expert.load`."""
    opened = open_lora(source, shapes)
    refuse_unmatched(opened.converted.unmatched, len(opened.header.tensors) - len(opened.converted.unmatched))
    return to_expert(opened, name=name or _default_name(source, opened), trigger=trigger, role=role)


def to_expert(opened: Opened, *, name: str, trigger: str | None = None, role: Role | None = None) -> Expert:
    """The canonical expert of an opened file."""
    if not opened.converted.modules:
        raise InvalidFile("This file holds no complete low-rank pair: it is not a LoRA.")
    metadata = opened.header.metadata
    return Expert(
        name=name,
        modules=opened.converted.modules,
        base=about.base_family(metadata, opened.converted.modules),
        trigger=trigger if trigger is not None else about.trigger_words(metadata),
        role=role or about.role(metadata),
        sha256=opened.sha256,
        metadata=metadata,
        producer=about.producer(metadata, opened.layout),
    )


def _default_name(source: Source, opened: Opened) -> str:
    if isinstance(source, bytes):
        return about.title(opened.header.metadata) or opened.sha256[:8]
    path = Path(source).resolve()
    if path.is_dir():
        return path.name
    return path.parent.name if path.name == WEIGHTS else path.stem
