"""From a file to an expert."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from torch import Tensor

from mole_diffusion.errors import InvalidFile, MoleError
from mole_diffusion.experts import metadata as about
from mole_diffusion.experts.canonical import Embeddings, Expert, Role
from mole_diffusion.experts.embeddings import call, joined, read_bundled, read_pivotal, split_bundled
from mole_diffusion.experts.formats import Converted
from mole_diffusion.experts.names import ModuleShapes, Resolver
from mole_diffusion.experts.peft_folder import WEIGHTS, config_beside, weights_of
from mole_diffusion.experts.recognise import recognise, refuse_unmatched
from mole_diffusion.experts.safefile import Header, Source, read_bytes, read_header, read_outline, read_tensors


@dataclass(frozen=True)
class Opened:
    """A file that was read, before anybody decided whether it is usable as an expert.

    ``embeddings_from`` names the file that embeddings were read from besides the LoRA's own.
    """

    header: Header
    layout: str
    converted: Converted
    sha256: str
    embeddings: Embeddings = field(default_factory=dict)
    embeddings_from: str | None = None


def open_lora(
    source: Source,
    shapes: ModuleShapes | None = None,
    *,
    embeddings: Source | bool = True,
    header_only: bool = False,
) -> Opened:
    """Read and convert a file without judging what it left over.

    Names that the base does not have are read by the grammar instead, so that a LoRA of another base is reported as
    such and not as gibberish.

    Args:
        source: a path, a folder of PEFT, or the file's bytes.
        shapes: ``base.module_shapes()``.
        embeddings: as for :meth:`mole_diffusion.experts.Expert.load`.
        header_only: read names, shapes and alphas alone: weights come on the meta device, and the file is only
            streamed for its hash.

    Raises:
        InvalidFile: as :func:`load_expert`, but not for unmatched keys.
    """
    source = weights_of(source)
    beside = config_beside(source)
    recognise(read_header(source))
    data = source if header_only else read_bytes(source)
    header = read_header(data)
    header = replace(header, metadata={**header.metadata, **beside, **about.sidecar(source)})
    layout = recognise(header)
    tensors = read_outline(data, values="alpha") if header_only else read_tensors(data)
    bundled, tensors = split_bundled(tensors)
    converted = layout.convert(tensors, header, Resolver(shapes))
    if shapes is not None and converted.unmatched:
        plain = layout.convert(tensors, header, Resolver())
        converted = converted if plain.unmatched else plain
    companion = companion_of(source, embeddings)
    tokens = _embeddings(bundled, companion)
    return Opened(header, layout.NAME, converted, _digest(data, beside, companion), tokens, _name(companion))


def load_expert(
    source: Source,
    *,
    name: str | None = None,
    trigger: str | None = None,
    role: Role | None = None,
    shapes: ModuleShapes | None = None,
    embeddings: Source | bool = True,
) -> Expert:
    """See :meth:`mole_diffusion.experts.Expert.load`."""
    opened = open_lora(source, shapes, embeddings=embeddings)
    refuse_unmatched(opened.converted.unmatched, len(opened.header.tensors) - len(opened.converted.unmatched))
    return to_expert(opened, name=name or _default_name(source, opened), trigger=trigger, role=role)


def content_sha256(source: Source, embeddings: Source | bool = True) -> str:
    """The ``sha256`` that an expert from this source has, without reading its tensors.

    Raises:
        InvalidFile: a folder without weights, or a file beside it that is damaged or cannot be read.
    """
    source = weights_of(source)
    return _digest(source, config_beside(source), companion_of(source, embeddings))


def companion_of(source: Source, embeddings: Source | bool = True) -> Source | None:
    """The pivotal-tuning file that belongs to a LoRA: the given one, or ``<stem>_emb.safetensors`` beside it."""
    if not isinstance(embeddings, bool):
        return embeddings
    if not embeddings or isinstance(source, bytes):
        return None
    beside = Path(source).with_name(f"{Path(source).stem}_emb.safetensors")
    return beside if beside.is_file() else None


def to_expert(opened: Opened, *, name: str, trigger: str | None = None, role: Role | None = None) -> Expert:
    """The canonical expert of an opened file."""
    if not opened.converted.modules:
        raise InvalidFile("This file holds no complete low-rank pair: it is not a LoRA.")
    metadata = opened.header.metadata
    if trigger is None:
        trigger = about.trigger_words(metadata) or call(opened.embeddings)
    return Expert(
        name=name,
        modules=opened.converted.modules,
        base=about.base_family(metadata, opened.converted.modules),
        trigger=trigger,
        role=role or about.role(metadata),
        sha256=opened.sha256,
        metadata=metadata,
        producer=about.producer(metadata, opened.layout),
        embeddings=opened.embeddings,
    )


def _embeddings(bundled: Mapping[str, Tensor], companion: Source | None) -> Embeddings:
    own = read_bundled(bundled)
    if companion is None:
        return own
    try:
        return joined(own, read_pivotal(companion))
    except MoleError as error:
        raise InvalidFile(f"The embeddings in {_name(companion)} cannot be used: {error}") from error


def _digest(source: Source, beside: Mapping[str, str], companion: Source | None) -> str:
    """SHA-256 over the file, then the configuration and the embeddings beside it."""
    digest = hashlib.sha256()
    _feed(digest, source)
    digest.update("".join(beside.values()).encode())
    if companion is not None:
        _feed(digest, companion)
    return digest.hexdigest()


def _feed(digest: hashlib._Hash, source: Source) -> None:
    if isinstance(source, bytes):
        digest.update(source)
        return
    try:
        with Path(source).open("rb") as stream:
            while block := stream.read(2**20):
                digest.update(block)
    except OSError as error:
        raise InvalidFile(f"Cannot read {Path(source).name!r}: {error.strerror or error}.") from error


def _name(companion: Source | None) -> str | None:
    if companion is None:
        return None
    return "the given embeddings" if isinstance(companion, bytes) else Path(companion).name


def _default_name(source: Source, opened: Opened) -> str:
    if isinstance(source, bytes):
        return about.title(opened.header.metadata) or opened.sha256[:8]
    path = Path(source).resolve()
    if path.is_dir():
        return path.name
    return path.parent.name if path.name == WEIGHTS else path.stem
