"""The canonical expert: for every target module a low-rank pair and a scale, whatever file it came from.

A DoRA module (arXiv 2402.09353, eq. 5) has a magnitude besides; a pivotal-tuning LoRA brings token embeddings.
"""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from mole_diffusion.errors import InvalidFile, InvalidRequest

if TYPE_CHECKING:
    from mole_diffusion.experts.names import ModuleShapes

COMPONENTS = ("unet", "transformer", "text_encoder", "text_encoder_2", "model")
MAX_RANK = 1024
Embeddings = Mapping[str, Mapping[str, Tensor]]
"""Token as the prompt spells it → "text_encoder" or "text_encoder_2" → (vectors, width of that encoder)."""
Role = Literal["subject", "style", "accelerator"]
ROLES = ("subject", "style", "accelerator")


@dataclass(frozen=True, eq=False)
class LowRank:
    """One module's low-rank update: delta = scale · b @ a.

    With a magnitude m the module is DoRA (arXiv 2402.09353, eq. 5): its weight becomes m ⊙ (W + delta) / ‖W + delta‖,
    the norm per output row over all inputs. ``delta`` is the low-rank part alone; who applies a pair asks ``magnitude``
    too, or ``applied_to``.

    Attributes:
        a: (r, d_in) for a linear module, (r, c_in, k, k) for a convolution.
        b: (d_out, r); a convolution's 1×1 kernel is stored without its two spatial dimensions.
        scale: α / r of the file.
        magnitude: (d_out,) for DoRA, None for a plain low-rank update.
    """

    a: Tensor
    b: Tensor
    scale: float = 1.0
    magnitude: Tensor | None = None

    def __post_init__(self) -> None:
        if self.a.ndim not in (2, 4) or self.b.ndim != 2 or self.b.shape[1] != self.a.shape[0]:
            raise InvalidFile(
                f"A low-rank pair must be (rank, in…) and (out, rank), got {tuple(self.a.shape)} and "
                f"{tuple(self.b.shape)}: the file is damaged."
            )
        if not 0 < self.rank <= MAX_RANK:
            raise InvalidFile(f"Expected a rank between 1 and {MAX_RANK}, got {self.rank}.")
        if self.magnitude is not None and self.magnitude.shape != self.b.shape[:1]:
            raise InvalidFile(
                f"A DoRA magnitude must have one number per output, ({self.b.shape[0]},), got "
                f"{tuple(self.magnitude.shape)}: the file is damaged."
            )

    @property
    def rank(self) -> int:
        """Inner dimension r."""
        return self.a.shape[0]

    @property
    def weight_shape(self) -> tuple[int, ...]:
        """Shape of the weight that this pair updates."""
        return (self.b.shape[0], *self.a.shape[1:])

    def delta(self) -> Tensor:
        """scale · b @ a in fp32, shaped like the module's weight; without the magnitude."""
        product = self.scale * (self.b.float() @ self.a.float().flatten(1))
        return product.reshape(self.weight_shape)

    def applied_to(self, weight: Tensor) -> Tensor:
        """The module's weight under this pair alone, in fp32: W + delta, rescaled to the magnitude where there is one.

        ``weight`` has ``weight_shape``.
        """
        changed = weight.float() + self.delta().to(weight.device)
        if self.magnitude is None:
            return changed
        norm = torch.linalg.vector_norm(changed.flatten(1), dim=1).clamp_min(torch.finfo(torch.float32).tiny)
        factor = self.magnitude.to(weight.device, torch.float32) / norm
        return changed * factor.reshape(-1, *[1] * (weight.ndim - 1))

    def reshaped(self, weight_shape: tuple[int, ...]) -> LowRank | None:
        """This pair for a module whose weight has ``weight_shape``; None where it does not fit.

        A 1×1 convolution and a linear layer hold the same numbers: files write either. Some write a convolution's
        kernel flat, (r, c_in·k·k).
        """
        if self.weight_shape == weight_shape:
            return self
        squeezed = tuple(self.a.shape[:2])
        if self.a.shape[2:] == (1, 1) and (self.b.shape[0], squeezed[1]) == weight_shape:
            return replace(self, a=self.a.reshape(squeezed))
        flat = (weight_shape[0], math.prod(weight_shape[1:]))
        if self.a.ndim == 2 and len(weight_shape) == 4 and self.weight_shape == flat:
            return replace(self, a=self.a.reshape(-1, *weight_shape[1:]))
        return None


@dataclass(frozen=True, eq=False)
class Expert:
    """One frozen adapter.

    Attributes:
        name: what the user calls it; unique within a composition.
        modules: "<component>.<module path>" → low-rank pair; component is one of ``COMPONENTS`` (model = a language
            model) and the path is that of ``named_modules()``.
        base: family it was trained for ("demo", "sd21", "sdxl", …), None = the file does not say.
        trigger: words that call the subject in a prompt.
        role: subject and style experts are gated; an accelerator (LCM, Lightning) is always on with weight 1.
        sha256: content hash of the file, and of the configuration or the embeddings that belong to it in other files.
        embeddings: tokens that it brings along, for the tokenizer and the text encoders; see ``experts/embeddings.py``.
    """

    name: str
    modules: Mapping[str, LowRank]
    base: str | None = None
    trigger: str | None = None
    role: Role = "subject"
    sha256: str = ""
    metadata: Mapping[str, str] = field(default_factory=dict)
    producer: str = "memory"
    embeddings: Embeddings = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.role not in ROLES:
            raise InvalidRequest(f"Expected the role subject, style or accelerator, got {self.role!r}.")
        if not self.sha256:
            object.__setattr__(self, "sha256", content_hash(self.modules, self.embeddings))

    @classmethod
    def load(
        cls,
        source: str | Path | bytes,
        *,
        name: str | None = None,
        trigger: str | None = None,
        role: Role | None = None,
        shapes: ModuleShapes | None = None,
        embeddings: str | Path | bytes | bool = True,
    ) -> Expert:
        """Read any supported LoRA file.

        Args:
            source: a path, or the file's bytes; a folder that PEFT's ``save_pretrained`` wrote counts as its file.
            name: default: the file's own title, else its file name.
            trigger: default: what the file's metadata says.
            role: default: what the file's metadata says, else subject.
            shapes: ``base.module_shapes()``; resolves names that are ambiguous without the base.
            embeddings: the pivotal-tuning file that belongs to it; True: ``<stem>_emb.safetensors`` beside ``source``
                where there is one, False: none. Tokens within the LoRA file itself are always read.

        Raises:
            InvalidFile: not a LoRA, damaged, of an unsupported kind, or with keys that nobody understands.
        """
        from mole_diffusion.experts.load import load_expert

        return load_expert(source, name=name, trigger=trigger, role=role, shapes=shapes, embeddings=embeddings)

    @property
    def components(self) -> tuple[str, ...]:
        """Which parts of the pipeline it changes, in pipeline order."""
        present = {key.split(".", 1)[0] for key in self.modules}
        return tuple(component for component in COMPONENTS if component in present)

    @property
    def dora(self) -> int:
        """Number of modules with a DoRA magnitude."""
        return sum(pair.magnitude is not None for pair in self.modules.values())

    @property
    def ranks(self) -> dict[int, int]:
        """rank → number of modules that have it."""
        return dict(sorted(Counter(pair.rank for pair in self.modules.values()).items()))

    @property
    def rank_summary(self) -> str:
        """'rank 8' or 'ranks 4–32'."""
        low, high = min(self.ranks), max(self.ranks)
        return f"rank {low}" if low == high else f"ranks {low}–{high}"


def content_hash(modules: Mapping[str, LowRank], embeddings: Embeddings | None = None) -> str:
    """SHA-256 over names and values, for experts that come from memory and have no file."""
    digest = hashlib.sha256()
    for key in sorted(modules):
        pair = modules[key]
        digest.update(f"{key}|{tuple(pair.a.shape)}|{tuple(pair.b.shape)}|{pair.scale!r}|".encode())
        for tensor in (pair.a, pair.b, pair.magnitude):
            digest.update(_values(tensor) if tensor is not None else b"")
    for token, parts in sorted((embeddings or {}).items()):
        for component, vectors in sorted(parts.items()):
            digest.update(f"{token!r}|{component}|{tuple(vectors.shape)}|".encode() + _values(vectors))
    return digest.hexdigest()


def _values(tensor: Tensor) -> bytes:
    return tensor.detach().to("cpu", torch.float32).contiguous().numpy().tobytes()
