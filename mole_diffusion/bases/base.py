"""A base model: one object that answers every question about it, so that nobody asks which family it is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mole_diffusion.bases.config_files import Config, block_paths, read_configs, vae_scale_factor, weight_shapes
from mole_diffusion.bases.families import FAMILIES, Family
from mole_diffusion.bases.prediction import levels, prediction
from mole_diffusion.bases.vae import decode_latents, encode_pictures
from mole_diffusion.errors import InvalidRequest

if TYPE_CHECKING:
    import torch
    from diffusers import DiffusionPipeline
    from torch import Tensor

    from mole_diffusion.bases.conditioning import Conditioning


@dataclass(frozen=True)
class Base:
    """A frozen text-to-image model that experts are made for.

    Attributes:
        name: what users and files call it: ``demo``, ``sd21``, ``sd21-base``, ``sdxl`` or a folder.
        title: its name for people.
        family: ``demo``, ``sd1``, ``sd21`` or ``sdxl``; experts of one family fit every base of it.
        source: a hub id, or a pipeline folder.
        revision: branch, tag or commit on the hub; None for a folder.
        prediction_type: ``epsilon`` or ``v_prediction``.
        resolution: side in pixels of the square pictures it was trained on.
        latent_channels: channels of the latents.
        size_multiple: width and height must be multiples of this many pixels.
        default_steps, default_guidance: what to sample with unless the user says otherwise.
        guidance_rescale: φ of arXiv 2305.08891 section 3.4, 0 = off; needed with zero terminal SNR.
        alignment_model: where the image-text model for scores comes from (``local-dir:`` folder or hub model).
        alignment_label: how a score of that model is called; never CLIP-T for a substitute.
        lora_targets: suffixes of the modules that a new LoRA trains.
        configs_source: pipeline folder or shipped JSON file that its sizes are read from.
        half_vae: hub id of the autoencoder to use in fp16, where its own overflows.
        on_slots: it learned from scenes whose things stand in few places and sizes, in the order of the prompt, never
            mirrored (the shipped demo base); whoever makes training pictures for it does the same.
    """

    name: str
    title: str
    family: str
    source: str
    revision: str | None
    prediction_type: str
    resolution: int
    latent_channels: int
    size_multiple: int
    default_steps: int
    default_guidance: float
    guidance_rescale: float
    alignment_model: str
    alignment_label: str
    lora_targets: tuple[str, ...]
    configs_source: Path
    half_vae: str | None = field(default=None)
    on_slots: bool = False

    @property
    def full_size(self) -> bool:
        """Whether it is large enough for reduced precision and checkpoints of activations to pay on a GPU."""
        return self.resolution >= 256

    @property
    def traits(self) -> Family:
        """The family's strategy."""
        return FAMILIES[self.family]

    @property
    def components(self) -> tuple[str, ...]:
        """Pipeline components that an expert may touch, the UNet first."""
        return self.traits.components

    @property
    def is_local(self) -> bool:
        """Whether it is a folder on this machine."""
        return self.revision is None

    def configs(self) -> dict[str, Config]:
        """Configurations of its components, read without weights and without the network."""
        return read_configs(self.configs_source)

    def module_shapes(self) -> dict[str, tuple[int, ...]]:
        """Weight shape of every linear and convolution layer, keyed as an Expert's modules."""
        return weight_shapes(self.configs(), self.components)

    def block_paths(self) -> tuple[str, ...]:
        """Paths of the UNet's transformer and residual blocks."""
        return block_paths(self.configs())

    def target_paths(self, component: str = "unet") -> tuple[str, ...]:
        """Paths in ``component`` of the modules that a new LoRA trains."""
        paths = [key.removeprefix(f"{component}.") for key in self.module_shapes() if key.startswith(f"{component}.")]
        return tuple(path for path in paths if any(f".{path}".endswith(f".{tail}") for tail in self.lora_targets))

    def load(self, device: torch.device | str = "cpu", dtype: torch.dtype | None = None) -> Any:
        """The pipeline, frozen, in evaluation mode, with a DDIM scheduler that never clips latents.

        Args:
            device: where to put it.
            dtype: precision; None = float32.

        Raises:
            InvalidRequest: the hub or the folder cannot be read; the message says what to do.
            InvalidFile: a component has weights missing.
        """
        from mole_diffusion.bases.loading import load_pipeline

        return load_pipeline(self, device, dtype)

    def encode(
        self,
        pipe: DiffusionPipeline,
        prompts: Sequence[str],
        *,
        negatives: Sequence[str] | None = None,
        size: tuple[int, int] | None = None,
    ) -> Conditioning:
        """Prompts as the UNet takes them.

        Args:
            pipe: this base's pipeline; a composition that wraps its ``encode_prompt`` learns the prompts here.
            prompts: one per row.
            negatives: one per prompt for classifier-free guidance; their rows come before those of the prompts.
                None = no guidance rows.
            size: (height, width) in pixels, for families that are told the picture's size.
        """
        if negatives is not None and len(negatives) != len(prompts):
            raise InvalidRequest(f"Expected one negative prompt per prompt ({len(prompts)}), got {len(negatives)}.")
        chosen = size or (self.resolution, self.resolution)
        return self.traits.encode(pipe, list(prompts), None if negatives is None else list(negatives), chosen)

    def unet_kwargs(self, conditioning: Conditioning) -> dict[str, Any]:
        """Keyword arguments for ``pipe.unet(latents, t, **kwargs)``."""
        return conditioning.unet_kwargs

    def denoise_target(self, scheduler: Any, latents: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """What the UNet should answer for ``latents`` (B, C, h, w) noised with ``noise`` to timesteps ``t`` (B,)."""
        return prediction(self.prediction_type).target(*levels(scheduler, t, latents), latents, noise)

    def x0_from(self, scheduler: Any, model_output: Tensor, noisy: Tensor, t: Tensor | int) -> Tensor:
        """The clean latents that the UNet's answer ``model_output`` for ``noisy`` (B, C, h, w) at ``t`` implies."""
        return prediction(self.prediction_type).clean(*levels(scheduler, t, noisy), noisy, model_output)

    def decode(self, pipe: Any, latents: Tensor) -> Tensor:
        """Pictures (B, 3, H, W) in 0…1 from latents (B, C, h, w)."""
        return decode_latents(pipe.vae, latents)

    def to_latents(self, pipe: Any, pictures: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
        """Latents from pictures (B, 3, H, W) in 0…1: the posterior's mean, or a sample of it with a generator."""
        return encode_pictures(pipe.vae, pictures, generator=generator)

    def latent_shape(self, height: int | None = None, width: int | None = None) -> tuple[int, int, int]:
        """(C, h, w) of the latents of one picture; its sides in pixels default to the base's resolution.

        Raises:
            InvalidRequest: a side is no multiple of ``size_multiple``.
        """
        sides = (height or self.resolution, width or self.resolution)
        for side in sides:
            if side < self.size_multiple or side % self.size_multiple:
                raise InvalidRequest(
                    f"Expected width and height in multiples of {self.size_multiple} pixels for {self.title}, "
                    f"got {sides[1]}×{sides[0]}."
                )
        scale = vae_scale_factor(self.configs())
        return self.latent_channels, sides[0] // scale, sides[1] // scale

    def cut_off(self, pipe: Any, prompt: str) -> str:
        """The end of ``prompt`` that does not fit into the text tower's tokens; empty where all of it fits."""
        tokenizer = pipe.tokenizer
        ids = tokenizer(prompt, add_special_tokens=False, verbose=False).input_ids
        return tokenizer.decode(ids[tokenizer.model_max_length - 2 :]).strip()
