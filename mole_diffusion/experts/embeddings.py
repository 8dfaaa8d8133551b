"""Token embeddings that belong to a LoRA: textual inversion (arXiv 2208.01618) trained together with it.

| where | keys | tokens |
|---|---|---|
| OneTrainer, within the LoRA file | bundle_emb.<token>.clip_l / clip_g | the token in the key, one or more vectors |
| A1111 bundles, SD 1/2 | bundle_emb.<token>.string_to_param.* | the same |
| diffusers' advanced scripts, <name>_emb.safetensors | clip_l, clip_g | <s0>, <s1>, …: one vector each |
| cog-sdxl, the same with older names | text_encoders_0, text_encoders_1 | the same |

The canonical form is ``Embeddings``: token → "text_encoder" / "text_encoder_2" → (vectors, width). In a prompt a token
stands for all its vectors in a row. Everything here is tensors and names; tokenizers and encoders are somebody else's.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, TypeVar

import torch
from torch import Tensor

from mole_diffusion.errors import InvalidFile
from mole_diffusion.experts.canonical import Embeddings, Expert

if TYPE_CHECKING:
    from mole_diffusion.experts.names import ModuleShapes
    from mole_diffusion.experts.safefile import Source

BUNDLE = "bundle_emb."
MAX_TOKENS, MAX_VECTORS, MAX_NAME = 64, 75, 64
MAX_FILE = 64 * 1024 * 1024
TOKENS_KEY = "mole.tokens"
"""Header entry of our own pivotal files: JSON list of [token, number of vectors]; without it <s0>, <s1>, …"""
_ENCODERS = {"clip_l": "text_encoder", "clip_g": "text_encoder_2"}
_BUNDLED = {**_ENCODERS, "string_to_param.*": "text_encoder"}
_PIVOTAL = {**_ENCODERS, "text_encoders_0": "text_encoder", "text_encoders_1": "text_encoder_2"}
_KEY = re.compile(r"bundle_emb\.(.+)\.(clip_[lg]|string_to_param\.\*)", re.DOTALL)
T = TypeVar("T")


def split_bundled(tensors: Mapping[str, T]) -> tuple[dict[str, T], dict[str, T]]:
    """(bundled embeddings, everything else) by key."""
    bundled = {key: value for key, value in tensors.items() if key.startswith(BUNDLE)}
    return bundled, {key: value for key, value in tensors.items() if key not in bundled}


def read_bundled(bundled: Mapping[str, Tensor]) -> Embeddings:
    """``bundle_emb.`` keys → embeddings.

    Raises:
        InvalidFile: output embeddings, an encoder that no base here has, or what :func:`check` refuses.
    """
    found: dict[str, dict[str, Tensor]] = {}
    for key, tensor in bundled.items():
        match = _KEY.fullmatch(key)
        if match is None:
            raise InvalidFile(_refusal(key))
        parts, component = found.setdefault(match[1], {}), _BUNDLED[match[2]]
        if component in parts:
            raise InvalidFile(f"The token {match[1][:MAX_NAME]!r} has two embeddings for one encoder: ambiguous.")
        parts[component] = _rows(key, tensor)
    return check(found)


def read_pivotal(source: Source) -> Embeddings:
    """A pivotal-tuning file → embeddings.

    Raises:
        InvalidFile: not such a file, damaged, over a limit, or what :func:`check` refuses.
    """
    from mole_diffusion.experts.safefile import read_header, read_tensors

    header = read_header(source, max_bytes=MAX_FILE)
    odd = next((key for key in header.tensors if key not in _PIVOTAL), None)
    if odd is not None or not header.tensors:
        raise InvalidFile(
            "Expected the embeddings of a pivotal-tuning LoRA, tensors clip_l and clip_g, got "
            f"{repr(odd[:80]) if odd else 'no tensors'}: give the <name>_emb.safetensors that came with the LoRA."
        )
    stacked: dict[str, Tensor] = {}
    for key, tensor in read_tensors(source, max_bytes=MAX_FILE).items():
        if _PIVOTAL[key] in stacked:
            raise InvalidFile(f"{key!r} is a second embedding for one encoder: refused as ambiguous.")
        stacked[_PIVOTAL[key]] = _rows(key, tensor)
    counts = {len(tensor) for tensor in stacked.values()}
    if len(counts) != 1:
        raise InvalidFile(
            f"The encoders of this pivotal file have {sorted(counts)} vectors, expected as many for each."
        )
    found: dict[str, dict[str, Tensor]] = {}
    start = 0
    for token, count in _layout(header.metadata.get(TOKENS_KEY), counts.pop()):
        found[token] = {component: tensor[start : start + count] for component, tensor in stacked.items()}
        start += count
    return check(found)


def check(embeddings: Embeddings) -> Embeddings:
    """The embeddings themselves.

    Raises:
        InvalidFile: too many tokens or vectors, a token that no prompt can spell or that the tokenizer needs itself, or
            encoders that disagree on a token's number of vectors.
    """
    if len(embeddings) > MAX_TOKENS:
        raise InvalidFile(f"Expected at most {MAX_TOKENS} embedded tokens, got {len(embeddings)}: refused.")
    for token, parts in embeddings.items():
        if not 0 < len(token) <= MAX_NAME or not token.isprintable() or " " in token or token.startswith("<|"):
            raise InvalidFile(
                f"{token[:MAX_NAME]!r} cannot be a token: expected 1 to {MAX_NAME} printable characters without "
                "spaces, other than the tokenizer's own <|…|>."
            )
        counts = {len(vectors) for vectors in parts.values()}
        if len(counts) != 1 or not 0 < max(counts) <= MAX_VECTORS:
            raise InvalidFile(
                f"The token {token!r} has {sorted(counts)} vectors, expected the same number for every encoder, 1 to "
                f"{MAX_VECTORS}."
            )
    return embeddings


def joined(first: Embeddings, second: Embeddings) -> Embeddings:
    """Both. Raises InvalidFile where they share a token."""
    if double := sorted(first.keys() & second.keys()):
        raise InvalidFile(f"The LoRA and the file beside it both define the token {double[0]!r}: refused as ambiguous.")
    return check({**first, **second})


def find_misfit(embeddings: Embeddings, shapes: ModuleShapes) -> str | None:
    """Why the embeddings do not fit a base of these module shapes, None where they do.

    Every encoder of the base needs vectors of its own width: with half of them a token would mean two things.
    """
    widths = encoder_widths(shapes)
    for token, parts in embeddings.items():
        found = {component: vectors.shape[1] for component, vectors in parts.items()}
        if found != widths:
            return f"the token {token!r} has vectors for {_widths(found)}, the base needs {_widths(widths)}"
    return None


def encoder_widths(shapes: ModuleShapes) -> dict[str, int]:
    """Text encoder → width of its token embeddings."""
    widths = {}
    for key, shape in shapes.items():
        component, _, path = key.partition(".")
        if component in _ENCODERS.values() and path.endswith("encoder.layers.0.self_attn.q_proj"):
            widths[component] = shape[1]
    return widths


def call(embeddings: Embeddings) -> str | None:
    """The words that call the subject: one token, or <s0><s1>… in a row; None where tokens may mean several things."""
    if all(re.fullmatch(r"<s[0-9]+>", token) for token in embeddings):
        return "".join(sorted(embeddings, key=lambda token: int(token[2:-1]))) or None
    return next(iter(embeddings)) if len(embeddings) == 1 else None


def shared_tokens(experts: Iterable[Expert]) -> dict[str, list[str]]:
    """Tokens that several experts define (every pivotal LoRA has an <s0>) → names of these experts."""
    owners: dict[str, list[str]] = {}
    for expert in experts:
        for token in expert.embeddings:
            owners.setdefault(token, []).append(expert.name)
    return {token: names for token, names in owners.items() if len(names) > 1}


def to_bundle(embeddings: Embeddings) -> dict[str, Tensor]:
    """As OneTrainer, ComfyUI and A1111 read them from within a kohya file."""
    names = {component: name for name, component in _ENCODERS.items()}
    return {
        f"{BUNDLE}{token}.{names[component]}": vectors.clone()
        for token, parts in embeddings.items()
        for component, vectors in parts.items()
    }


def to_pivotal(embeddings: Embeddings) -> tuple[dict[str, Tensor], dict[str, str]]:
    """(tensors, header) of a pivotal file, for ``pipe.load_textual_inversion(tensors["clip_l"], token=[…], …)``.

    Raises:
        InvalidFile: tokens that serve different encoders do not fit into one stack.
    """
    if len({frozenset(parts) for parts in embeddings.values()}) > 1:
        raise InvalidFile("These tokens serve different encoders and do not fit one pivotal file: export kohya.")
    components = next(iter(embeddings.values()), {})
    stacked = {
        name: torch.cat([parts[component] for parts in embeddings.values()])
        for name, component in _ENCODERS.items()
        if component in components
    }
    counts = [[token, len(next(iter(parts.values())))] for token, parts in embeddings.items()]
    return stacked, {TOKENS_KEY: json.dumps(counts)}


def _rows(key: str, tensor: Tensor) -> Tensor:
    rows = tensor[None] if tensor.ndim == 1 else tensor
    if rows.ndim != 2 or not rows.numel():
        raise InvalidFile(f"The embedding {key[:80]!r} has the shape {tuple(tensor.shape)}, expected (vectors, width).")
    single = rows.float() if rows.dtype == torch.float64 else rows
    if not single.is_meta and not single.isfinite().all():
        raise InvalidFile(f"The embedding {key[:80]!r} is too large for float32: the file is damaged.")
    return single


def _layout(stated: str | None, count: int) -> list[tuple[str, int]]:
    """(token, number of vectors) in the order of the stack."""
    if count > MAX_TOKENS * MAX_VECTORS:
        raise InvalidFile(f"Expected at most {MAX_TOKENS} embedded tokens, got {count} vectors: refused.")
    if stated is None:
        return [(f"<s{index}>", 1) for index in range(count)]
    try:
        layout = [(str(token), number) for token, number in json.loads(stated)]
    except (ValueError, TypeError, RecursionError) as error:
        raise InvalidFile(f"The {TOKENS_KEY} of this file is malformed: the file is damaged.") from error
    numbers = [number for _, number in layout]
    if not all(type(number) is int and number > 0 for number in numbers) or sum(numbers) != count:
        raise InvalidFile(f"The {TOKENS_KEY} of this file does not count its {count} vectors: the file is damaged.")
    if len(dict(layout)) != len(layout):
        raise InvalidFile(f"The {TOKENS_KEY} of this file names a token twice: refused as ambiguous.")
    return layout


def _refusal(key: str) -> str:
    if key.endswith("_out"):
        return (
            f"{key[:80]!r} is an output embedding, added behind the text encoder; only embeddings that the encoder "
            "reads are supported: train it without output embeddings."
        )
    return f"The bundled embedding {key[:80]!r} is for no text encoder of SD or SDXL, expected clip_l or clip_g."


def _widths(widths: Mapping[str, int]) -> str:
    return ", ".join(f"{component} ({width})" for component, width in sorted(widths.items())) or "no text encoder"
