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
JOINT_TARGETS = ("add_q_proj", "add_k_proj", "add_v_proj", "to_add_out", "ff_context.net.2", "norm1.linear")
T5_TARGETS = ("SelfAttention.q", "SelfAttention.v", "wi_0")


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


def t5_tokenizer() -> Any:
    """A real T5Tokenizer over single letters; unlike CLIP's it tells capitals apart."""
    from transformers import T5Tokenizer

    letters = list(string.ascii_letters + string.digits + ",.")
    words = [(f"▁{letter}", -4.0) for letter in letters] + [("▁", -6.0)] + [(letter, -5.0) for letter in letters]
    return T5Tokenizer(vocab=[("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -9.0), *words], extra_ids=0, model_max_length=24)


def t5(tokens: Any) -> Any:
    from transformers import T5Config, T5EncoderModel

    sizes = {"d_model": 24, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2, "vocab_size": len(tokens)}
    return T5EncoderModel(T5Config(**sizes, feed_forward_proj="gated-gelu", dropout_rate=0.0)).eval()


def make_pixart() -> Any:
    """PixArt-Sigma in small: captions of a T5, cross-attention, patches of 2×2; 8×8 latents."""
    from diffusers import PixArtSigmaPipeline, PixArtTransformer2DModel

    torch.manual_seed(0)
    tokens = t5_tokenizer()
    transformer = PixArtTransformer2DModel(
        sample_size=8,
        num_layers=2,
        num_attention_heads=2,
        attention_head_dim=8,
        cross_attention_dim=16,
        in_channels=4,
        out_channels=8,
        caption_channels=24,
        num_embeds_ada_norm=1000,
        use_additional_conditions=False,
    )
    pipe = PixArtSigmaPipeline(tokens, t5(tokens), vae(), transformer.eval(), scheduler())
    pipe.set_progress_bar_config(disable=True)
    return pipe


def make_sd3() -> Any:
    """SD 3 in small: joint blocks, the last without a text side; two CLIP encoders, no T5."""
    from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline
    from transformers import CLIPTextModelWithProjection

    torch.manual_seed(0)
    tokens, tokens_2 = tokenizer(), tokenizer()
    transformer = SD3Transformer2DModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=32,
        caption_projection_dim=16,
        pooled_projection_dim=32,
        pos_embed_max_size=16,
    )
    pipe = StableDiffusion3Pipeline(
        transformer=transformer.eval(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=vae(),
        text_encoder=CLIPTextModelWithProjection(text_config(16, tokens)).eval(),
        tokenizer=tokens,
        text_encoder_2=CLIPTextModelWithProjection(text_config(16, tokens_2)).eval(),
        tokenizer_2=tokens_2,
        text_encoder_3=None,
        tokenizer_3=None,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


class Small(nn.Module):
    """A bare module: a convolution, then a layer over its cells as tokens, (B, 4, H, W) → (B, H·W, 6)."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 8, 3, padding=1)
        self.head = nn.ModuleList([nn.Linear(8, 8), nn.Linear(8, 6)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        tokens = self.conv(x).flatten(2).mT.contiguous()
        return self.head[1](nn.functional.silu(self.head[0](tokens)))


def make_module() -> nn.Module:
    """The bare module."""
    torch.manual_seed(0)
    return Small().eval()


def models_of(pipe: Any) -> dict[str, nn.Module]:
    """Component → model, of a pipeline or of a bare module."""
    if isinstance(pipe, nn.Module):
        return {"module": pipe}
    names = ("unet", "transformer", "text_encoder", "text_encoder_2")
    return {name: getattr(pipe, name) for name in names if getattr(pipe, name, None) is not None}


def main_of(pipe: Any) -> nn.Module:
    """The denoiser, or the bare module."""
    return next(iter(models_of(pipe).values()))


def shapes_of(pipe: Any) -> dict[str, tuple[int, ...]]:
    """What ``base.module_shapes()`` says of this pipeline."""
    return {
        f"{component}.{path}": tuple(module.weight.shape)
        for component, model in models_of(pipe).items()
        for path, module in model.named_modules()
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


def run_model(
    pipe: Any, rows: int = 2, seed: int = 1, size: tuple[int, int] = (8, 8), only: int | None = None
) -> torch.Tensor:
    """One call of any tiny model on fixed random inputs, in the model's own dtype; ``only`` = that row alone."""
    model = main_of(pipe)
    random = torch.Generator().manual_seed(seed)
    dtype = next(model.parameters()).dtype

    def normal(*shape: int) -> torch.Tensor:
        values = torch.randn(rows, *shape, generator=random).to(dtype)
        return values if only is None else values[only : only + 1]

    x = normal(4, *size)
    if isinstance(model, Small):
        return model(x)
    config: Any = model.config
    kwargs: dict[str, Any] = {}
    if hasattr(pipe, "unet"):
        width = config.cross_attention_dim
        if config.addition_embed_type:
            kwargs["added_cond_kwargs"] = {"text_embeds": normal(16), "time_ids": torch.ones_like(normal(6))}
    elif "joint_attention_dim" in config:
        width, kwargs = config.joint_attention_dim, {"pooled_projections": normal(32)}
    else:
        width, kwargs = config.caption_channels, {"added_cond_kwargs": {"resolution": None, "aspect_ratio": None}}
    times = torch.full((x.shape[0],), 500)
    text = normal(pipe.tokenizer.model_max_length, width)
    return model(x, encoder_hidden_states=text, timestep=times, **kwargs).sample


def add_experts(pipe: Any, weights: dict[Any, float]) -> Any:
    """Σ w_i·(W_i − W) added to the model's own weights, W_i by definition; the reference for static weights."""
    models = models_of(pipe)
    for key in shapes_of(pipe):
        component, _, path = key.partition(".")
        weight: Any = models[component].get_submodule(path).weight
        found = [(expert.modules[key], w) for expert, w in weights.items() if key in expert.modules]
        change = sum(w * (pair.applied_to(weight.detach()) - weight.detach()) for pair, w in found)
        weight.data += change
    return pipe


def generate(pipe: Any, prompt: str = "a robot and a bunny", **kwargs: Any) -> torch.Tensor:
    """Latents after two steps."""
    settings: dict[str, Any] = {"num_inference_steps": 2, "guidance_scale": 4.0, "output_type": "latent"}
    settings |= {"height": 8, "width": 8}
    if hasattr(pipe, "transformer"):
        settings["max_sequence_length"] = 24
        if "joint_attention_dim" not in pipe.transformer.config:  # PixArt
            settings |= {"use_resolution_binning": False, "clean_caption": False}
    return pipe(prompt, generator=torch.Generator().manual_seed(0), **{**settings, **kwargs}).images


def randomise(composition: Any, seed: int = 3, size: float = 0.5) -> None:
    """Leave the initial state, where some gradients are zero and all gates are uniform."""
    random = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in composition.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=random) * size)


PIPELINES: dict[str, Callable[[], Any]] = {"sd": make_sd, "sdxl": make_sdxl}
HOSTS: dict[str, Callable[[], Any]] = {**PIPELINES, "pixart": make_pixart, "sd3": make_sd3, "module": make_module}
