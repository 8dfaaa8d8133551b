"""Factories of tiny real models and files for tests: the classes users run, a few thousand weights each.

pipe = tiny_sd()                       StableDiffusionPipeline shaped as the demo base (64 px, 8×8×8 latents)
pipe = tiny_sdxl()                     StableDiffusionXLPipeline with both text towers
tiny_lora(path, pipe, seed=1)          a LoRA file in diffusers' format for that pipeline
tiny_clip(folder)                      an open_clip folder for ``local-dir:``
tiny_assets(folder)                    an assets folder as the repository's, for MOLE_ASSETS
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw
from safetensors.torch import save_file

from mole_diffusion.experts.save import write_safetensors

TOKENS = 32
ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
SUBJECTS = {"robot": "red", "bunny": "blue"}


def tiny_sd(prediction_type: str = "v_prediction", *, zero_snr: bool | None = None, seed: int = 0) -> Any:
    """A StableDiffusionPipeline in the demo base's shape. Zero terminal SNR by default with v-prediction only."""
    from diffusers import StableDiffusionPipeline

    torch.manual_seed(seed)
    pipe = StableDiffusionPipeline(
        unet=_unet(cross_attention_dim=32),
        vae=_vae(),
        text_encoder=_text_tower(),
        tokenizer=_tokenizer("!"),
        scheduler=_scheduler(prediction_type, prediction_type == "v_prediction" if zero_snr is None else zero_snr),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    return _quiet(pipe)


def tiny_sdxl(prediction_type: str = "epsilon", *, seed: int = 0) -> Any:
    """A StableDiffusionXLPipeline: two text towers, pooled embedding and time ids as added conditions."""
    from diffusers import StableDiffusionXLPipeline

    torch.manual_seed(seed)
    added = {
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": 6 * 8 + 32,
        "transformer_layers_per_block": (1, 2),
    }
    pipe = StableDiffusionXLPipeline(
        unet=_unet(cross_attention_dim=64, **added),
        vae=_vae(),
        text_encoder=_text_tower(),
        text_encoder_2=_text_tower(projected=True),
        tokenizer=_tokenizer("<|endoftext|>"),
        tokenizer_2=_tokenizer("!"),
        scheduler=_scheduler(prediction_type, False),
        add_watermarker=False,
    )
    return _quiet(pipe)


def _quiet(pipe: Any) -> Any:
    for component in pipe.components.values():
        if isinstance(component, torch.nn.Module):
            component.requires_grad_(False).eval()
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _unet(cross_attention_dim: int, **more: Any) -> Any:
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(
        sample_size=8,
        in_channels=8,
        out_channels=8,
        block_out_channels=(16, 32),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=cross_attention_dim,
        attention_head_dim=(2, 4),
        norm_num_groups=8,
        use_linear_projection=True,
        **more,
    )


def _vae() -> Any:
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        block_out_channels=(8, 8, 8, 8),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=1,
        latent_channels=8,
        norm_num_groups=4,
        sample_size=64,
        scaling_factor=0.5,
    )


def _text_tower(*, projected: bool = False) -> Any:
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    config = CLIPTextConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        projection_dim=32,
        max_position_embeddings=TOKENS,
        vocab_size=49408,
        eos_token_id=49407,
        bos_token_id=49406,
        pad_token_id=0,
    )
    return (CLIPTextModelWithProjection if projected else CLIPTextModel)(config)


def _tokenizer(pad_token: str) -> Any:
    from mole_diffusion.bases.tokenizer import clip_tokenizer

    return clip_tokenizer(TOKENS, pad_token=pad_token)


def _scheduler(prediction_type: str, zero_snr: bool) -> Any:
    from diffusers import DDIMScheduler

    return DDIMScheduler(
        beta_schedule="scaled_linear",
        beta_start=0.00085,
        beta_end=0.012,
        clip_sample=False,
        prediction_type=prediction_type,
        rescale_betas_zero_snr=zero_snr,
        set_alpha_to_one=False,
        steps_offset=1,
        timestep_spacing="trailing" if zero_snr else "leading",
    )


def tiny_lora(
    path: Path,
    pipe: Any,
    *,
    rank: int = 2,
    seed: int = 1,
    scale: float = 1.0,
    targets: Sequence[str] = ATTENTION,
    components: Sequence[str] = ("unet",),
    metadata: Mapping[str, str] | None = None,
) -> Path:
    """A LoRA file in diffusers' format (``<component>.<path>.lora_A.weight``), random in both factors.

    Targets are suffixes of the modules' paths; for text towers pass ``("q_proj", "v_proj")`` and the like.
    """
    generator = torch.Generator().manual_seed(seed)
    tensors: dict[str, torch.Tensor] = {}
    for component in components:
        for name, module in getattr(pipe, component).named_modules():
            if name.endswith(tuple(targets)) and isinstance(module, torch.nn.Linear | torch.nn.Conv2d):
                tensors |= _factors(f"{component}.{name}", module.weight, rank, scale, generator)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_safetensors(tensors, path, metadata or {"format": "pt"})  # equal content, equal hash
    return path


def _factors(
    key: str, weight: torch.Tensor, rank: int, scale: float, generator: torch.Generator
) -> dict[str, torch.Tensor]:
    out_features, *rest = weight.shape
    down = torch.randn(rank, *rest, generator=generator) / weight[0].numel() ** 0.5
    up = torch.randn(out_features, rank, *[1] * (len(rest) - 1), generator=generator) * scale / rank**0.5
    return {f"{key}.lora_A.weight": down, f"{key}.lora_B.weight": up}


def tiny_clip(folder: Path, *, seed: int = 0) -> Path:
    """An image-text model of open_clip with random weights, in the layout that ``local-dir:`` reads."""
    import open_clip

    folder.mkdir(parents=True, exist_ok=True)
    model_cfg = {
        "embed_dim": 16,
        "vision_cfg": {"image_size": 64, "patch_size": 16, "width": 32, "layers": 2, "head_width": 16},
        "text_cfg": {"context_length": TOKENS, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2},
    }
    preprocess = {"mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5], "interpolation": "bicubic", "resize_mode": "squash"}
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": model_cfg, "preprocess_cfg": preprocess}))
    torch.manual_seed(seed)
    model = open_clip.CLIP(**model_cfg)
    save_file(
        {name: value.contiguous() for name, value in model.state_dict().items()}, folder / "open_clip_model.safetensors"
    )
    return folder


def cut_out(colour: str, shape: str = "ellipse", size: int = 96, turn: float = 0.0) -> Image.Image:
    """A picture with alpha: one shape in one colour, a white eye, turned by ``turn`` degrees."""
    picture = Image.new("RGBA", (size, size), (0, 0, 0, 0))
    draw = ImageDraw.Draw(picture)
    box = (size // 5, size // 8, size - size // 5, size - size // 8)
    (draw.ellipse if shape == "ellipse" else draw.rectangle)(box, fill=colour)
    draw.ellipse((size * 2 // 5, size // 4, size * 2 // 5 + size // 8, size // 4 + size // 8), fill="white")
    return picture.rotate(turn)


def tiny_subject(folder: Path, name: str, colour: str, *, train: int = 3, heldout: int = 2) -> Path:
    """A subject folder: ``train/NN.png``, ``heldout/NN.png`` (cut-outs with alpha) and ``subject.json``."""
    target = folder / name
    shape = "ellipse" if len(name) % 2 else "rectangle"
    for part, count, first in (("train", train, 0), ("heldout", heldout, train)):
        (target / part).mkdir(parents=True, exist_ok=True)
        for index in range(count):
            cut_out(colour, shape, turn=15.0 * (first + index) - 20).save(target / part / f"{index:02d}.png")
    facts = {"name": name, "class": name, "trigger": f"zwx {name}", "prompt": f"a zwx {name}"}
    (target / "subject.json").write_text(json.dumps({**facts, "source": "drawn by tests", "licence": "CC0"}))
    return target


def tiny_assets(folder: Path, subjects: Mapping[str, str] | None = None) -> Path:
    """An assets folder as the repository's: base, image-text model, subjects, one expert each. Returns ``folder``."""
    demo = folder / "demo"
    pipe = tiny_sd()
    pipe.save_pretrained(demo / "base")
    tiny_clip(demo / "clip")
    for seed, (name, colour) in enumerate((subjects or SUBJECTS).items(), start=1):
        tiny_subject(demo / "subjects", name, colour)
        metadata = {"mole.base": "demo", "modelspec.trigger_phrase": f"zwx {name}"}
        tiny_lora(demo / "experts" / f"{name}.safetensors", pipe, seed=seed, metadata=metadata)
    (demo / "compositions").mkdir(parents=True, exist_ok=True)
    return folder
