"""Tell a LoRA from the many other things that come as safetensors, by key names alone."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import NoReturn

from mole_diffusion.errors import InvalidFile
from mole_diffusion.experts.formats import Format, find_format
from mole_diffusion.experts.safefile import MAX_BYTES, Header
from mole_diffusion.experts.sniff import describe_size

# A part of a key → what the file is, and why it is refused.
UNSUPPORTED = {
    ".oft_": "OFT (orthogonal fine-tuning), which multiplies weights by a rotation and has no low-rank pair",
    ".boft_": "BOFT (orthogonal fine-tuning), which multiplies weights by a rotation and has no low-rank pair",
    ".w_norm": "a LoRA with trained normalisation layers; they are no linear map, so no gate can weigh them",
    ".b_norm": "a LoRA with trained normalisation layers; they are no linear map, so no gate can weigh them",
    ".diff_b": "a LoRA with trained biases; they add the same to every input, and experts here have weights alone",
    ".lora_B.bias": "a LoRA with trained biases; they add the same to every input, and experts here have weights alone",
    ".lora_embedding_": "a low-rank change of the whole token embedding, which no layer here composes",
    "lora_mixer": "MoSLoRA with its mixer apart, without which A and B mean nothing; fold the mixer in on export",
    "lora_AB": "MoSLoRA with its mixer apart, without which A and B mean nothing; fold the mixer in on export",
}
_BY_POSITION = re.compile(r"[A-Za-z0-9_]+:\d+:(?:up|down)")
_CHECKPOINT_PREFIXES = ("model.diffusion_model.", "first_stage_model.", "cond_stage_model.", "conditioner.embedders.")
_MODEL_PARTS = {
    "a full UNet": ("down_blocks.", "up_blocks.", "mid_block."),
    "a text encoder": ("text_model.", "encoder.layers."),
    "a VAE": ("decoder.", "encoder.down", "quant_conv"),
    "a diffusion transformer": ("transformer_blocks.", "single_transformer_blocks.", "double_blocks."),
}
_OTHER_BASES = {
    "lora_transformer_": "Flux or SD 3",
    "lora_unet_double_blocks": "Flux",
    "lora_unet_joint_blocks": "SD 3",
    "transformer.": "Flux or SD 3",
    "diffusion_model.double_blocks": "Flux",
    "lora_prior_": "Stable Cascade",
}


def recognise(header: Header) -> Format:
    """The layout of a LoRA file.

    Raises:
        InvalidFile: a full model, an embedding, an unsupported kind of adapter, or nothing known; says which.
    """
    keys = list(header.tensors)
    if "mole.composition" in header.metadata:
        raise InvalidFile("This is a saved composition, not a LoRA: open it as a composition.")
    if not keys:
        raise InvalidFile("This safetensors file holds no tensors: it is not a LoRA.")
    _refuse_model(keys, header)
    _refuse_unsupported(keys)
    for prefix, family in _OTHER_BASES.items():
        if any(key.startswith(prefix) for key in keys):
            raise InvalidFile(f"This LoRA was made for {family}; only Stable Diffusion 2.1 and SDXL LoRAs fit here.")
    layout = find_format(header)
    if layout is None:
        _refuse_unknown(keys)
    if header.size > MAX_BYTES:
        raise InvalidFile(f"Expected a LoRA of at most {describe_size(MAX_BYTES)}, got {describe_size(header.size)}.")
    return layout


def refuse_unmatched(unmatched: Iterable[str], matched: int) -> None:
    """A file is applied as a whole or not at all.

    Raises:
        InvalidFile: names up to three of the keys that nobody understands.
    """
    left = list(unmatched)
    if left:
        raise InvalidFile(
            f"{len(left)} of {len(left) + matched} tensors in this file are not understood ({_shown(left)}); it is not "
            "applied in part."
        )


def _refuse_model(keys: list[str], header: Header) -> None:
    if any(key.startswith(_CHECKPOINT_PREFIXES) for key in keys):
        raise InvalidFile(
            f"This is a full model checkpoint ({describe_size(header.size)}), not a LoRA: upload the LoRA alone."
        )
    if any("lora" in key or "hada" in key or "lokr" in key for key in keys):
        return
    for kind, prefixes in _MODEL_PARTS.items():
        if sum(key.removeprefix("unet.").startswith(prefixes) for key in keys) > len(keys) / 2:
            raise InvalidFile(f"This is {kind} ({describe_size(header.size)}), not a LoRA: upload the LoRA alone.")


def _refuse_unsupported(keys: list[str]) -> None:
    for part, meaning in UNSUPPORTED.items():
        if hits := [key for key in keys if part in key]:
            raise InvalidFile(f"This file is {meaning}: {len(hits)} of {len(keys)} tensors ({_shown(hits)}).")
    if hits := [key for key in keys if _BY_POSITION.fullmatch(key)]:
        raise InvalidFile(
            f"This is a flat list as cloneofsimo/lora writes it ({_shown(hits)}): its weights have numbers instead of "
            "module names, and which module a number means depends on the diffusers version of then. Guessing would "
            "apply them to wrong layers: convert it to kohya's or diffusers' format with the version that wrote it."
        )


def _shown(keys: list[str]) -> str:
    return ", ".join(repr(key[:80]) for key in keys[:3]) + (", …" if len(keys) > 3 else "")


def _refuse_unknown(keys: list[str]) -> NoReturn:
    names = {"emb_params", "clip_l", "clip_g", "string_to_param", "text_encoders_0", "text_encoders_1"}
    if names & set(keys) or any(key.startswith(("<", "bundle_emb.")) for key in keys):
        raise InvalidFile(
            "This is a textual-inversion embedding, not a LoRA: it cannot be an expert. One that came with a LoRA is "
            "read beside it, as <name of the LoRA>_emb.safetensors."
        )
    raise InvalidFile(
        f"This safetensors file is not a LoRA: none of its {len(keys)} tensors is a low-rank weight "
        f"(for example {keys[0][:80]!r})."
    )
