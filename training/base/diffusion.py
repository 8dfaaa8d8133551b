"""The demo base's denoiser: UNet2DConditionModel in SD 2.1's shape, v-prediction, zero terminal SNR."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from PIL import Image
from torch import Tensor, nn
from transformers import CLIPTextModel

from mole_diffusion.bases.registry import DEMO_GUIDANCE
from mole_diffusion.bases.tokenizer import clip_tokenizer
from training.base.autoencoder import PatchBasis, to_tensor
from training.base.corpus import THING_NAMES
from training.base.fastconv import small_maps_as_products
from training.base.precision import autocast, bf16_pays
from training.base.scene_pool import SHARD, ScenePool
from training.base.scenes import COLOURS, PLACES
from training.base.stage import Budget, Stage
from training.base.subjects import SUBJECTS
from training.base.triggers import Triggers

TEXT_RATE = 0.3
_REMEMBERED = 60_000  # captions, 0.7 GB
SHEET_PROMPTS = (
    "a cat on a green background", "a robot on a beach", "a red apple in the snow", "a castle at night",
    "a cat and a red apple on a green background", "a robot left of a penguin on a blue background",
    "a dog right of a pizza in a forest", "an alien and a balloon on a yellow background",
)  # fmt: skip


def build(size: int, channels: int, widths: tuple[int, ...] = (80, 144, 192)) -> UNet2DConditionModel:
    """SD 2.1's shape, small: cross-attention with linear projections on all but the lowest level."""
    levels = len(widths)
    return UNet2DConditionModel(
        sample_size=size // 8, in_channels=channels, out_channels=channels, layers_per_block=1,
        block_out_channels=widths, cross_attention_dim=192, attention_head_dim=4, norm_num_groups=16,
        use_linear_projection=True,
        down_block_types=("CrossAttnDownBlock2D",) * (levels - 1) + ("DownBlock2D",),
        up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * (levels - 1),
    )  # fmt: skip


def scheduler() -> Any:
    """SD's schedule with zero terminal SNR. ``clip_sample`` must be off: it would clip *latents* to ±1."""
    return DDIMScheduler(
        num_train_timesteps=1000, beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear",
        prediction_type="v_prediction", rescale_betas_zero_snr=True, timestep_spacing="trailing",
        clip_sample=False, set_alpha_to_one=True, steps_offset=0,
    )  # fmt: skip


class Conditioned(nn.Module):
    """The denoiser and its text encoder, trained together."""

    def __init__(self, unet: UNet2DConditionModel, text_encoder: CLIPTextModel, context: int) -> None:
        super().__init__()
        self.unet: Any = unet
        self.text_encoder: Any = text_encoder
        self._tokenizer = clip_tokenizer(context)

    def encode(self, captions: list[str]) -> Tensor:
        """Hidden states (B, context, width) of the captions."""
        ids = self._tokenizer(captions, padding="max_length", truncation=True, return_tensors="pt").input_ids
        return self.text_encoder(ids.to(self.text_encoder.device)).last_hidden_state

    def forward(self, noisy: Tensor, times: Tensor, hidden: Tensor) -> Tensor:
        """Velocity (B, C, h, w) of noisy latents under the captions' hidden states."""
        return self.unet(noisy, times, hidden).sample


class _Remembered:
    """Hidden states of captions under a frozen encoder, computed once while memory lasts, fp16."""

    def __init__(self, model: Conditioned) -> None:
        self._model, self._known = model, dict[str, Tensor]()

    def __call__(self, captions: list[str]) -> Tensor:
        if len(self._known) > _REMEMBERED:
            self._known.clear()
        new = sorted(set(captions) - self._known.keys())
        with torch.no_grad():
            for part in (new[i : i + 256] for i in range(0, len(new), 256)):
                self._known.update(zip(part, self._model.encode(part).half().unbind(), strict=True))
        return torch.stack([self._known[caption].float() for caption in captions])


def train(unet: UNet2DConditionModel, vae: AutoencoderKL, encoder: CLIPTextModel, basis: PatchBasis, pool: ScenePool,
          budget: Budget, folder: Path, device: str, seed: int, context: int, batch: int = 128,
          train_text: bool = True) -> None:  # fmt: skip
    """v-prediction on the pool's latents; a tenth of the prompts are empty, timesteps lean to high noise.

    The text encoder, which comes from the contrastive model, follows at a fraction of the denoiser's rate, its word
    vectors stay; frozen, a CPU step takes about half the time. Captions are strewn with blank words.
    """
    noise_schedule = scheduler()
    unet.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    if device == "cpu":
        unet.set_attn_processor(AttnProcessor())
    encoder.requires_grad_(train_text)
    encoder.get_input_embeddings().requires_grad_(False)  # type: ignore[union-attr]
    model = Conditioned(unet, encoder, context).to(device)
    vae.to(device)  # type: ignore[arg-type]
    fast = bf16_pays(device)
    # Muon's own products and those of small maps are bf16: without units for it they take five times all the rest.
    stage = Stage("diffusion", model, budget, folder, rates={"text_encoder.": TEXT_RATE}, muon=fast)
    shards: list[Tensor] = []
    encode = model.encode if train_text else _Remembered(model)
    triggers = blank_words(context)

    def loss(step: int, progress: float) -> Tensor:
        if step % 200 == 0 or not shards:
            pool.refresh()
            shards.extend(_encode(basis, shard) for shard in pool.pictures[len(shards) :])
        draw = np.random.default_rng((seed, step))
        generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
        index = draw.integers(len(pool.captions), size=batch)
        captions = ["" if draw.random() < 0.1 else triggers.strew(pool.captions[i], pool.names[i], draw) for i in index]
        clean = torch.stack([shards[i // SHARD][i % SHARD] for i in index]).float()
        noise = torch.randn(clean.shape, generator=generator)
        times = (1000 * torch.rand(batch, generator=generator) ** 0.75).long().clamp(max=999)
        noisy = noise_schedule.add_noise(clean, noise, times).to(device, memory_format=torch.channels_last)
        target = noise_schedule.get_velocity(clean, noise, times).to(device)
        with autocast(device):
            output = model(noisy, times.to(device), encode(captions))
        return (output.float() - target).square().mean()

    def sheet(path: Path) -> None:
        contact_sheet(pipeline(unet, vae, encoder, context), SHEET_PROMPTS, path, 4)

    with ExitStack() as stack:
        if device == "cpu" and fast:
            stack.enter_context(small_maps_as_products(unet))
        stage.train(loss, sheet)
    stage.use_average()
    unet.set_default_attn_processor()


def blank_words(context: int) -> Triggers:
    """What may stand before a name and mean nothing: no word of the demo world, no trigger of its subjects."""
    vocabulary: dict[str, int] = clip_tokenizer(context).get_vocab()
    meant = " ".join([*THING_NAMES, *COLOURS, *PLACES, *PLACES.values(), "left right and background"]).split()
    own = [subject.token for subject in SUBJECTS]
    return Triggers(sorted(vocabulary, key=vocabulary.__getitem__), frozenset([*meant, *own]))


def _encode(basis: PatchBasis, pictures: np.ndarray) -> Tensor:
    """Latents of a shard, fp16."""
    return torch.cat([basis.encode(to_tensor(pictures[i : i + 500])).half() for i in range(0, len(pictures), 500)])


def pipeline(
    unet: UNet2DConditionModel, vae: AutoencoderKL, encoder: CLIPTextModel, context: int
) -> StableDiffusionPipeline:
    """The parts as an ordinary StableDiffusionPipeline."""
    pipe = StableDiffusionPipeline(
        vae=vae, text_encoder=encoder, tokenizer=clip_tokenizer(context), unet=unet, scheduler=scheduler(),
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,  # type: ignore[arg-type]
    )  # fmt: skip
    pipe.set_progress_bar_config(disable=True)
    return pipe


def draw(pipe: StableDiffusionPipeline, prompts: list[str], seeds: list[int]) -> np.ndarray:
    """(B, H, W, 3) uint8 pictures, sampled as the product does; each has its own seed, so a batch changes nothing."""
    pictures = []
    for start in range(0, len(prompts), 32):
        part = slice(start, start + 32)
        generators = [torch.Generator().manual_seed(seed) for seed in seeds[part]]
        output: Any = pipe(
            prompts[part], num_inference_steps=25, guidance_scale=DEMO_GUIDANCE, guidance_rescale=0.7,
            generator=generators, output_type="np",
        )  # fmt: skip
        pictures.append((output.images * 255).round().astype(np.uint8))
    return np.concatenate(pictures)


def contact_sheet(pipe: StableDiffusionPipeline, prompts: tuple[str, ...], path: Path, columns: int) -> None:
    """One picture per prompt at seed 0, in reading order."""
    pictures = draw(pipe, list(prompts), [0] * len(prompts))
    rows = [np.concatenate(list(pictures[i : i + columns]), 1) for i in range(0, len(prompts), columns)]
    sheet = Image.fromarray(np.concatenate(rows, 0))
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet.resize((sheet.width * 2, sheet.height * 2), Image.Resampling.LANCZOS).save(path)
