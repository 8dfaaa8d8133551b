"""Write experts for other tools; a killed process never leaves half a file under the real name."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from mole_diffusion.errors import InvalidRequest
from mole_diffusion.experts.canonical import Embeddings, Expert, LowRank
from mole_diffusion.experts.embeddings import to_bundle, to_pivotal

_SCALES = ("lora_adapter_metadata", "ss_network_alpha", "ss_network_dim")


def save_expert(
    expert: Expert | Mapping[str, LowRank],
    path: str | Path,
    *,
    format: Literal["diffusers", "kohya"] = "diffusers",
    metadata: Mapping[str, str] | None = None,
    dtype: torch.dtype | None = None,
) -> Path:
    """Write one safetensors file, atomically.

    A DoRA magnitude is written as ``lora_magnitude_vector`` or ``dora_scale``; diffusers reads the first, ComfyUI the
    second. Embeddings go into the kohya file; diffusers takes no such keys, so there they become
    ``<stem>_emb.safetensors`` beside it, for ``pipe.load_textual_inversion``.

    Args:
        expert: an expert, or its modules.
        path: the file to write.
        format: ``diffusers`` = PEFT keys, scale folded into B, loads with ``pipe.load_lora_weights``; ``kohya`` =
            flattened diffusers names with one alpha per module, loads in ComfyUI and the like.
        metadata: header strings; those of the expert (trigger, base family, role) are added where absent.
        dtype: store in this dtype; default: as the expert has them.

    Raises:
        InvalidRequest: unknown format.
    """
    modules = expert.modules if isinstance(expert, Expert) else expert
    if format == "diffusers":
        tensors = _diffusers(modules)
    elif format == "kohya":
        tensors = _kohya(modules)
    else:
        raise InvalidRequest(f"Expected the format diffusers or kohya, got {format!r}.")
    embeddings = expert.embeddings if isinstance(expert, Expert) else {}
    if embeddings and format == "kohya":
        tensors |= to_bundle(embeddings)
    elif embeddings:
        write_safetensors(*_beside(embeddings, Path(path), dtype))
    if dtype is not None:
        tensors = {key: tensor.to(dtype) for key, tensor in tensors.items()}
    header = {**_metadata(expert), **(metadata or {})}
    return write_safetensors({key: tensor.contiguous() for key, tensor in tensors.items()}, Path(path), header)


def _beside(
    embeddings: Embeddings, path: Path, dtype: torch.dtype | None
) -> tuple[dict[str, Tensor], Path, dict[str, str]]:
    stacked, header = to_pivotal(embeddings)
    tensors = {key: tensor.to(dtype or tensor.dtype) for key, tensor in stacked.items()}
    return tensors, path.with_name(f"{path.stem}_emb.safetensors"), header


def write_safetensors(tensors: Mapping[str, Tensor], path: Path, metadata: Mapping[str, str]) -> Path:
    """Write beside the target, then rename over it."""
    from safetensors.torch import save

    data = _ordered(save({key: tensor.detach().cpu() for key, tensor in tensors.items()}, dict(metadata) or None))
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".part")
    try:
        with os.fdopen(handle, "wb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    return path


def _ordered(data: bytes) -> bytes:
    """The file with its metadata sorted: safetensors shuffles them, and equal content should have equal hashes."""
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    if "__metadata__" not in header:
        return data
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)  # tensors start at multiples of 8 bytes
    return len(text).to_bytes(8, "little") + text + data[8 + size :]


def _diffusers(modules: Mapping[str, LowRank]) -> dict[str, Tensor]:
    tensors = {}
    for key, pair in modules.items():
        name = _with_text_model(key)
        up = (pair.b.float() * pair.scale).to(pair.b.dtype)
        tensors[f"{name}.lora_A.weight"] = pair.a.clone()
        tensors[f"{name}.lora_B.weight"] = up[..., None, None] if pair.a.ndim == 4 else up
        if pair.magnitude is not None:
            shape = (1, -1, 1, 1) if pair.a.ndim == 4 else (-1,)
            tensors[f"{name}.lora_magnitude_vector"] = pair.magnitude.reshape(shape).clone()
    return tensors


def _kohya(modules: Mapping[str, LowRank]) -> dict[str, Tensor]:
    sdxl = any(key.startswith("text_encoder_2.") for key in modules)
    prefixes = {"unet": "lora_unet", "text_encoder": "lora_te1" if sdxl else "lora_te", "text_encoder_2": "lora_te2"}
    odd = next((key for key in modules if key.partition(".")[0] not in prefixes), None)
    if odd is not None:
        raise InvalidRequest(f"kohya's format has no place for {odd}: choose the format diffusers.")
    tensors = {}
    for key, pair in modules.items():
        component, _, path = _with_text_model(key).partition(".")
        name = f"{prefixes[component]}_{path.replace('.', '_')}"
        tensors[f"{name}.lora_down.weight"] = pair.a.clone()
        tensors[f"{name}.lora_up.weight"] = (pair.b[..., None, None] if pair.a.ndim == 4 else pair.b).clone()
        tensors[f"{name}.alpha"] = torch.tensor(pair.scale * pair.rank, dtype=torch.float32)
        if pair.magnitude is not None:
            tensors[f"{name}.dora_scale"] = pair.magnitude.reshape(-1, *[1] * (pair.a.ndim - 1)).clone()
    return tensors


def _with_text_model(key: str) -> str:
    """Files spell text towers with ``text_model.``, which every version of every tool reads."""
    component, _, path = key.partition(".")
    if not component.startswith("text_encoder") or path == "text_projection":
        return key
    return f"{component}.text_model.{path.removeprefix('text_model.')}"


def _metadata(expert: Expert | Mapping[str, LowRank]) -> dict[str, str]:
    if not isinstance(expert, Expert):
        return {}
    stated = {"modelspec.trigger_phrase": expert.trigger, "mole.base": expert.base, "mole.role": expert.role}
    # The scale is in B or in the alphas now: what the header said of it would be applied a second time.
    kept = {key: value for key, value in expert.metadata.items() if key not in _SCALES}
    return {**kept, **{key: value for key, value in stated.items() if value}}
