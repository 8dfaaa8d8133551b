"""Tiny real pipelines, built from configs with random weights, and random experts for them."""

from __future__ import annotations

import string
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from mole_diffusion.experts import Expert, LowRank

SD_TARGETS = ("to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2")
CONV_TARGETS = ("conv1", "conv2", "conv_shortcut", "downsamplers.0.conv", "upsamplers.0.conv", "conv_in", "conv_out")
OUTSIDE_TARGETS = ("proj_in", "proj_out", "time_emb_proj", "linear_1", "linear_2")
TEXT_TARGETS = ("q_proj", "v_proj", "out_proj", "fc1")


def tokenizer() -> Any:
    """A real CLIPTokenizer over single letters and a few words; ends words and lower-cases as CLIP does."""
    from transformers import CLIPTokenizer

    letters = list(string.ascii_lowercase + string.digits + ",.")
    vocab = {token: index for index, token in enumerate([*letters, *(f"{letter}</w>" for letter in letters)])}
    vocab.update({"<|startoftext|>": len(vocab), "<|endoftext|>": len(vocab) + 1})
    return CLIPTokenizer(vocab=vocab, merges=[], model_max_length=24)


def text_config(width: int, tokens: Any) -> Any:
    from transformers import CLIPTextConfig

    return CLIPTextConfig(
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=2,
        num_attention_heads=2,
        vocab_size=len(tokens),
        max_position_embeddings=tokens.model_max_length,
        projection_dim=width,
        bos_token_id=tokens.bos_token_id,
        eos_token_id=tokens.eos_token_id,
        pad_token_id=tokens.pad_token_id,
    )


def unet(width: int, **extra: Any) -> Any:
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        block_out_channels=(16, 32),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=width,
        attention_head_dim=8,
        use_linear_projection=True,
        norm_num_groups=4,
        **extra,
    )


def vae() -> Any:
    from diffusers import AutoencoderKL

    return AutoencoderKL(block_out_channels=(8,), norm_num_groups=4, sample_size=8, latent_channels=4)


def scheduler() -> Any:
    from diffusers import DDIMScheduler

    return DDIMScheduler(
        clip_sample=False,
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        set_alpha_to_one=False,
        steps_offset=1,
    )


def make_sd() -> Any:
    """SD 2.1 in small: linear projections, one text encoder; 8×8 latents."""
    from diffusers import StableDiffusionPipeline
    from transformers import CLIPTextModel

    torch.manual_seed(0)
    tokens = tokenizer()
    pipe = StableDiffusionPipeline(
        vae=vae(),
        text_encoder=CLIPTextModel(text_config(24, tokens)).eval(),
        tokenizer=tokens,
        unet=unet(24).eval(),
        scheduler=scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def make_sdxl() -> Any:
    """SDXL in small: two text encoders, added conditions, two transformer layers in the inner block."""
    from diffusers import StableDiffusionXLPipeline
    from transformers import CLIPTextModel, CLIPTextModelWithProjection

    torch.manual_seed(0)
    tokens, tokens_2 = tokenizer(), tokenizer()
    extra = {
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": 6 * 8 + 16,
        "transformer_layers_per_block": (1, 2),
    }
    pipe = StableDiffusionXLPipeline(
        vae=vae(),
        text_encoder=CLIPTextModel(text_config(16, tokens)).eval(),
        text_encoder_2=CLIPTextModelWithProjection(text_config(16, tokens_2)).eval(),
        tokenizer=tokens,
        tokenizer_2=tokens_2,
        unet=unet(32, **extra).eval(),
        scheduler=scheduler(),
        add_watermarker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def shapes_of(pipe: Any) -> dict[str, tuple[int, ...]]:
    """What ``base.module_shapes()`` says of this pipeline."""
    return {
        f"{component}.{path}": tuple(module.weight.shape)
        for component in ("unet", "text_encoder", "text_encoder_2")
        if getattr(pipe, component, None) is not None
        for path, module in getattr(pipe, component).named_modules()
        if isinstance(module, nn.Linear | nn.Conv2d)
    }


def make_expert(
    pipe: Any,
    name: str,
    *,
    rank: int = 2,
    seed: int = 0,
    targets: tuple[str, ...] = SD_TARGETS,
    scale: float = 0.7,
    trigger: str | None = None,
    size: float = 0.3,
    **extra: Any,
) -> Expert:
    """A random expert on every module whose path ends in one of ``targets``."""
    random = torch.Generator().manual_seed(seed)
    modules = {}
    for key, shape in shapes_of(pipe).items():
        if key.endswith(tuple(f".{target}" for target in targets)):
            a = torch.randn(rank, *shape[1:], generator=random) * size
            b = torch.randn(shape[0], rank, generator=random) * size
            modules[key] = LowRank(a, b, scale)
    assert modules
    return Expert(name, modules, trigger=trigger or name, **extra)


def run_unet(pipe: Any, rows: int = 2, seed: int = 1, size: tuple[int, int] = (8, 8)) -> torch.Tensor:
    """One UNet call on fixed random inputs."""
    random = torch.Generator().manual_seed(seed)
    width = pipe.unet.config.cross_attention_dim
    tokens = pipe.tokenizer.model_max_length
    kwargs: dict[str, Any] = {}
    if pipe.unet.config.addition_embed_type:
        kwargs["added_cond_kwargs"] = {
            "text_embeds": torch.randn(rows, 16, generator=random),
            "time_ids": torch.ones(rows, 6),
        }
    return pipe.unet(
        torch.randn(rows, 4, *size, generator=random),
        torch.tensor(500),
        encoder_hidden_states=torch.randn(rows, tokens, width, generator=random),
        **kwargs,
    ).sample


def generate(pipe: Any, prompt: str = "a robot and a bunny", **kwargs: Any) -> torch.Tensor:
    """Latents after two steps."""
    settings = {"num_inference_steps": 2, "guidance_scale": 4.0, "output_type": "latent", "height": 8, "width": 8}
    return pipe(prompt, generator=torch.Generator().manual_seed(0), **{**settings, **kwargs}).images


def randomise(composition: Any, seed: int = 3, size: float = 0.5) -> None:
    """Leave the initial state, where some gradients are zero and all gates are uniform."""
    random = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in composition.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=random) * size)


PIPELINES: dict[str, Callable[[], Any]] = {"sd": make_sd, "sdxl": make_sdxl}
