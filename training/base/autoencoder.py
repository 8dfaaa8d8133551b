"""The demo base's AutoencoderKL: an analytic encoder and a learned decoder.

A CPU cannot train an encoder and a decoder at full resolution in minutes, so the encoder is *computed*: principal
components of 8x8 patches, written into an ordinary AutoencoderKL. Latents are known before any training, so the
denoiser and the decoder learn at the same time. Measured on one core: 22.1 dB after 60 s of decoder training,
against 15.8 dB when both are learned.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL
from diffusers.models.resnet import ResnetBlock2D
from PIL import Image
from torch import Tensor, nn

from training.base.corpus import Cutout
from training.base.precision import autocast
from training.base.scenes import BACKGROUNDS, paint_background, paste, random_scene
from training.base.stage import Budget, Stage

PATCH = 8
_LARGE = 64.0
_LOG_VARIANCE = -12.0


@dataclass(frozen=True)
class PatchBasis:
    """Latent = ``projection``ᵀ(patch - ``mean``); patch (192,) in -1..1, channel-major; projection (192, k)."""

    mean: Tensor
    projection: Tensor

    @classmethod
    def fit(cls, pictures: np.ndarray, channels: int) -> PatchBasis:
        """Leading components, scaled by deviation^0.6: detail stays weaker than colour, as in natural spectra."""
        patches = _patches(to_tensor(pictures)).flatten(0, 2)
        mean = patches.mean(0)
        centred = patches - mean
        vectors, variances, _ = torch.linalg.svd(centred.T @ centred / len(centred))
        deviation = variances[:channels].sqrt()
        scale = deviation**0.6 * deviation[0] ** 0.4
        latents = centred @ (vectors[:, :channels] / scale)
        return cls(mean, vectors[:, :channels] / scale / latents.std())

    @classmethod
    def of(cls, model: AutoencoderKL) -> PatchBasis:
        """The basis that an encoder made by :func:`build` computes; of the mean only its projection is known."""
        blocks: Any = model.encoder.down_blocks
        last, latent = blocks[2].downsamplers[0].conv, model.config["latent_channels"]
        taps = last.weight.detach().float()[:latent, :48, :2, :2]
        cube = torch.zeros(latent, 3, PATCH, PATCH)
        for colour, y, x in product(range(3), range(PATCH), range(PATCH)):
            cube[:, colour, y, x] = taps[:, _stored_channel(colour, y, x), y // 4, x // 4]
        projection = cube.flatten(1).T.contiguous()
        offset = last.bias.detach().float()[:latent]
        return cls(-torch.linalg.pinv(projection.T) @ offset, projection)

    def encode(self, pictures: Tensor) -> Tensor:
        """(B, 3, H, W) in -1..1 -> (B, k, H/8, W/8); what the AutoencoderKL's encoder computes, in one product."""
        return ((_patches(pictures) - self.mean) @ self.projection).permute(0, 3, 1, 2)


def _patches(pictures: Tensor) -> Tensor:
    """(B, 3, H, W) -> (B, H/8, W/8, 192), each patch channel-major, then row-major."""
    batch, channels, height, width = pictures.shape
    grid = pictures.reshape(batch, channels, height // PATCH, PATCH, width // PATCH, PATCH)
    return grid.permute(0, 2, 4, 1, 3, 5).flatten(3)


def build(size: int, basis: PatchBasis) -> AutoencoderKL:
    """A small AutoencoderKL in Stable Diffusion's shape, 8x down, whose encoder computes ``basis`` exactly."""
    shape: dict[str, Any] = {
        "block_out_channels": (16, 48, 96, 128),
        "down_block_types": ("DownEncoderBlock2D",) * 4,
        "up_block_types": ("UpDecoderBlock2D",) * 4,
    }
    latent = basis.projection.shape[1]
    model = AutoencoderKL(
        latent_channels=latent, sample_size=size, layers_per_block=1, norm_num_groups=1,
        mid_block_add_attention=False, **shape,
    )  # fmt: skip
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.xavier_uniform_(module.weight)
            nn.init.zeros_(module.bias)  # type: ignore[arg-type]
    for module in model.modules():
        if isinstance(module, ResnetBlock2D):  # residual branches start silent
            nn.init.zeros_(module.conv2.weight)
    with torch.no_grad():
        _write_encoder(model, basis)
        _identity(model.post_quant_conv)
    model.register_to_config(scaling_factor=1.0)
    return model


def _write_encoder(model: AutoencoderKL, basis: PatchBasis) -> None:
    """Space-to-depth three times along the residual path, then the projection, past the last norm and SiLU.

    SiLU passes a signal when it comes as a pair: silu(x) - silu(-x) = x. The last group norm passes it when large
    constants beside it own the variance: x / K * K.
    """
    encoder: Any = model.encoder
    latent = basis.projection.shape[1]
    _identity(encoder.conv_in)
    stored = 3
    for block in encoder.down_blocks[:3]:
        _identity(block.resnets[0].conv_shortcut)
        down = block.downsamplers[0].conv
        down.weight.zero_()
        down.bias.zero_()
        if block is not encoder.down_blocks[2]:
            for tap in range(4):  # channel = tap * stored + c
                for channel in range(stored):
                    down.weight[tap * stored + channel, channel, tap // 2, tap % 2] = 1
            stored *= 4
            continue
        weight = _projection_taps(basis)  # (k, 48, 2, 2)
        down.weight[:latent, :stored, :2, :2] = weight
        down.weight[latent : 2 * latent, :stored, :2, :2] = -weight
        offset = -(basis.mean @ basis.projection)
        down.bias[:latent], down.bias[latent : 2 * latent] = offset, -offset
        signs = torch.ones(down.bias.shape[0] - 2 * latent)
        signs[1::2] = -1
        down.bias[2 * latent :] = _LARGE * signs
    _identity(encoder.down_blocks[3].resnets[0].conv_shortcut)
    norm, out, width = encoder.conv_norm_out, encoder.conv_out, encoder.conv_out.in_channels
    share = (encoder.down_blocks[2].downsamplers[0].conv.bias.shape[0] - 2 * latent) / width
    norm.weight.fill_(_LARGE * share**0.5)
    norm.bias.zero_()
    out.weight.zero_()
    out.bias.zero_()
    for k in range(latent):
        out.weight[k, k, 1, 1], out.weight[k, latent + k, 1, 1] = 1, -1
    out.bias[latent:] = _LOG_VARIANCE
    _identity(model.quant_conv)


def _projection_taps(basis: PatchBasis) -> Tensor:
    """The projection as the last stride-2 convolution, (k, 48, 2, 2), in the order that two space-to-depths left."""
    latent = basis.projection.shape[1]
    taps = torch.zeros(latent, 48, 2, 2)
    cube = basis.projection.T.reshape(latent, 3, PATCH, PATCH)
    for colour, y, x in product(range(3), range(PATCH), range(PATCH)):
        taps[:, _stored_channel(colour, y, x), y // 4, x // 4] = cube[:, colour, y, x]
    return taps


def _stored_channel(colour: int, y: int, x: int) -> int:
    """Where two space-to-depths put a pixel of a patch: fine place within coarse place."""
    first, second = (y % 2) * 2 + x % 2, (y // 2 % 2) * 2 + x // 2 % 2
    return second * 12 + first * 3 + colour


def _identity(conv: Any) -> None:
    """The first min(in, out) channels pass; nothing else."""
    if conv is None:
        return
    conv.weight.zero_()
    conv.bias.zero_()
    centre = conv.kernel_size[0] // 2
    for channel in range(min(conv.in_channels, conv.out_channels)):
        conv.weight[channel, channel, centre, centre] = 1


def picture_pool(things: dict[str, Cutout], extra: list[Cutout], count: int, size: int, seed: int) -> np.ndarray:
    """(count, size, size, 3) uint8: scenes of named things and free collages of every other emoji."""
    rng = np.random.default_rng(seed)
    named = {name: thing.rgba for name, thing in things.items()}
    pool = np.empty((count, size, size, 3), np.uint8)
    for index in range(count):
        if index % 5 < 2:
            pool[index] = random_scene(named, size, rng).image
            continue
        if rng.random() < 0.3:
            ground = np.broadcast_to(rng.uniform(0, 255, 3).astype(np.float32), (size, size, 3)).copy()
        else:
            ground = paint_background(str(rng.choice(BACKGROUNDS)), size, rng)
        for _ in range(int(rng.integers(1, 5))):
            cut = extra[int(rng.integers(len(extra)))].rgba
            if rng.random() < 0.3:  # colours that no emoji has
                cut = np.concatenate([cut[..., rng.permutation(3)], cut[..., 3:]], -1)
            x, y = rng.uniform(0, size, 2)
            ground, _ = paste(ground, cut, size * rng.uniform(0.3, 0.8), (x, y), rng, rotate=30)
        pool[index] = np.clip(ground, 0, 255)
    return pool


def to_tensor(pictures: np.ndarray) -> Tensor:
    """(B, H, W, 3) uint8 -> (B, 3, H, W) float in -1..1."""
    return torch.from_numpy(np.ascontiguousarray(pictures)).permute(0, 3, 1, 2).float().div_(127.5).sub_(1)


def reconstruction_loss(target: Tensor, output: Tensor, progress: float) -> Tensor:
    """Squared error first (colour is learned fast), then L1 on pixels and on their differences (edges stay edges)."""
    loss = (1 - progress) * (output - target).square().mean() + 0.3 * (output - target).abs().mean()
    for axis in (-1, -2):
        loss = loss + 0.3 * progress * (output.diff(dim=axis) - target.diff(dim=axis)).abs().mean()
    return loss


def train_decoder(model: AutoencoderKL, basis: PatchBasis, pool: np.ndarray, budget: Budget, folder: Path,
                  device: str, seed: int) -> AutoencoderKL:  # fmt: skip
    """Train the decoder on half-size crops; the last fifth of the budget sees whole pictures."""
    decoder: Any = model.decoder.to(device).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    stage = Stage("decoder", decoder, budget, folder)
    size = pool.shape[1]

    def loss(step: int, progress: float) -> Tensor:
        rng = np.random.default_rng((seed, step))
        whole = progress > 0.8
        batch = pool[rng.integers(len(pool), size=8 if whole else 16)]
        if not whole:
            crop = size // 2
            places = rng.integers(0, crop + 1, (len(batch), 2))
            batch = np.stack([p[y : y + crop, x : x + crop] for p, (y, x) in zip(batch, places, strict=True)])
        pictures = to_tensor(batch)
        # Sampled latents are never perfect: a little noise teaches the decoder to forgive.
        latents = basis.encode(pictures)
        latents = latents + torch.randn_like(latents) * float(rng.uniform(0, 0.08))
        with autocast(device):
            output = decoder(latents.to(device, memory_format=torch.channels_last)).float()
        return reconstruction_loss(pictures.to(device), output, progress)

    def sheet(path: Path) -> None:
        shown = to_tensor(pool[-16:])
        output = decoder(basis.encode(shown).to(device)).float().clamp(-1, 1).cpu()
        both = torch.cat([shown, output]).add(1).mul(127.5).byte().permute(0, 2, 3, 1).numpy()
        rows = [np.concatenate(list(both[i : i + 8]), 1) for i in (0, 16, 8, 24)]
        picture = Image.fromarray(np.concatenate(rows, 0))
        picture.resize((picture.width * 2, picture.height * 2), Image.Resampling.NEAREST).save(path)

    stage.train(loss, sheet)
    stage.use_average()
    return model


def signal_to_noise(model: AutoencoderKL, basis: PatchBasis, pictures: np.ndarray) -> float:
    """Peak signal-to-noise ratio of reconstructions, in dB."""
    target = to_tensor(pictures)
    with torch.no_grad():
        output = model.decoder(basis.encode(target)).clamp(-1, 1)
    return float(-10 * torch.log10((output - target).square().mean() / 4))
