"""Tokens that experts bring (pivotal tuning, bundled embeddings): lent to a pipeline, and taken back exactly.

The pipeline gets copies of its tokenizers with the new words, and wider tables of token embeddings; its own objects
come back untouched.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from mole_diffusion.errors import BaseMismatch, InvalidRequest
from mole_diffusion.experts.canonical import Expert
from mole_diffusion.experts.embeddings import shared_tokens

ENCODERS = {"text_encoder": "tokenizer", "text_encoder_2": "tokenizer_2"}


def lend_tokens(pipe: Any, experts: Sequence[Expert]) -> Callable[[], None]:
    """Teach the pipeline the experts' tokens; the returned function makes it forget them.

    A token of several vectors takes as many places in the prompt: diffusers pipelines spell "token" out as
    "token token_1 …".

    Raises:
        InvalidRequest: two experts define one token, or a token is a word that the tokenizer has already.
        BaseMismatch: vectors of another width than the encoder's.
    """
    double = next(iter(shared_tokens(experts).items()), None)
    if double is not None:
        raise InvalidRequest(
            f"The experts {' and '.join(map(repr, double[1]))} both define the token {double[0]!r}: give one of them "
            "another name in its file, or use one at a time."
        )
    with ExitStack() as stack:
        for component, tokenizer in ENCODERS.items():
            vectors = _vectors(experts, component)
            if vectors:
                _lend(pipe, component, tokenizer, vectors, stack)
        return stack.pop_all().close
    raise AssertionError("unreachable")


def _vectors(experts: Sequence[Expert], component: str) -> dict[str, Tensor]:
    """Word → one vector (width,); several vectors of a token are called token, token_1, …"""
    found = {}
    for expert in experts:
        for token, parts in expert.embeddings.items():
            for index, row in enumerate(parts.get(component, ())):
                found[f"{token}_{index}" if index else token] = row
    return found


def _lend(pipe: Any, component: str, name: str, vectors: dict[str, Tensor], stack: ExitStack) -> None:
    from transformers import AddedToken

    encoder, original = getattr(pipe, component, None), getattr(pipe, name, None)
    if encoder is None or original is None:
        raise BaseMismatch(f"An expert brings tokens for {component}, which this pipeline does not have.")
    table: nn.Embedding = encoder.get_input_embeddings()
    rows = torch.stack(list(vectors.values())).to(table.weight)
    if rows.shape[1] != table.embedding_dim:
        raise BaseMismatch(
            f"An expert's tokens have {rows.shape[1]} channels, {component} of this pipeline has {table.embedding_dim}."
        )
    taught = copy.deepcopy(original)
    known = taught.get_vocab()
    taken = next((word for word in vectors if word in known), None)
    if taken is not None:
        raise InvalidRequest(f"An expert defines the token {taken!r}, which this pipeline's tokenizer has already.")
    taught.add_tokens([AddedToken(word, single_word=False, normalized=False) for word in vectors])
    ids = taught.convert_tokens_to_ids(list(vectors))
    size = max(table.num_embeddings, max(ids) + 1)
    weight = torch.zeros(size, table.embedding_dim, dtype=table.weight.dtype, device=table.weight.device)
    weight[: table.num_embeddings] = table.weight.detach()
    weight[torch.tensor(ids, device=weight.device)] = rows
    wider = nn.Embedding(size, table.embedding_dim, _weight=weight).requires_grad_(False)
    stack.callback(setattr, pipe, name, original)
    setattr(pipe, name, taught)
    stack.callback(encoder.set_input_embeddings, table)
    encoder.set_input_embeddings(wider)
