"""The CLIP byte-pair tokenizer, built from the vocabulary file that open_clip ships: no network, no download."""

from __future__ import annotations

import gzip
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mole_diffusion.errors import InvalidRequest

if TYPE_CHECKING:
    from transformers import CLIPTokenizer

_BPE_FILE = "bpe_simple_vocab_16e6.txt.gz"
_VOCAB_SIZE = 49408
_BYTES = 256
_SPECIAL = ("<|startoftext|>", "<|endoftext|>")


def clip_tokenizer(max_length: int = 77, *, pad_token: str = "!") -> CLIPTokenizer:
    """The tokenizer of every CLIP text tower; its ids equal those of ``open_clip.tokenize``.

    Args:
        max_length: tokens a prompt is padded and cut to, start and end token included.
        pad_token: ``"!"`` (id 0) as in Stable Diffusion 2.1, ``"<|endoftext|>"`` as in SDXL's first encoder. As in
            those files the padding token is a special one, so an exclamation mark in a prompt gets its id too.
    """
    from transformers import CLIPTokenizer

    vocab, pairs = _vocabulary()
    merges: Any = list(pairs)
    return CLIPTokenizer(vocab=dict(vocab), merges=merges, pad_token=pad_token, model_max_length=max_length)


@lru_cache(maxsize=1)
def _vocabulary() -> tuple[dict[str, int], list[tuple[str, str]]]:
    spec = find_spec("open_clip")
    if spec is None or spec.origin is None:
        raise InvalidRequest("The CLIP vocabulary is read from open_clip, which is missing: install open_clip_torch.")
    lines = gzip.decompress((Path(spec.origin).parent / _BPE_FILE).read_bytes()).decode("utf-8").split("\n")
    pairs = [line.split() for line in lines[1 : _VOCAB_SIZE - 2 * _BYTES - len(_SPECIAL) + 1]]
    merges = [(left, right) for left, right in pairs]
    letters = _byte_letters()
    words = [*letters, *(letter + "</w>" for letter in letters), *(a + b for a, b in merges), *_SPECIAL]
    return {word: index for index, word in enumerate(words)}, merges


def _byte_letters() -> list[str]:
    """One printable letter per byte, printable bytes first: the alphabet of GPT-2's byte-level encoding."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    return [chr(byte) for byte in printable] + [chr(_BYTES + index) for index in range(_BYTES - len(printable))]
