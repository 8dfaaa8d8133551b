"""The demo world's own image-text model: a small OpenCLIP, trained contrastively on composed scenes.

It scores alignment in the demo; its text tower also becomes the text encoder of the demo base, as OpenCLIP's
did for Stable Diffusion 2.
"""

from __future__ import annotations

import json
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import open_clip
import torch
import torch.nn.functional as F
from open_clip.model import CLIP
from safetensors.torch import save_file
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import CLIPTextConfig, CLIPTextModel

from training.base.precision import autocast
from training.base.scene_pool import ScenePool
from training.base.scenes import BACKGROUNDS, GRID, article, background_phrase
from training.base.stage import Budget, Stage

MEAN, STD = (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)


def config(size: int, context: int) -> dict[str, object]:
    """open_clip's model configuration."""
    return {
        "embed_dim": 192,
        # A residual network: half the time of a vision transformer's step on a CPU (LOG.md).
        "vision_cfg": {"image_size": size, "layers": [1, 1, 1, 1], "width": 24, "head_width": 48},
        "text_cfg": {"context_length": context, "vocab_size": 49408, "width": 192, "heads": 4, "layers": 4},
    }


def build(size: int, context: int) -> CLIP:
    """A CLIP of about 15 M parameters, most of them word embeddings."""
    return CLIP(**config(size, context))  # type: ignore[arg-type]


def tokenise(captions: list[str], context: int) -> Tensor:
    """(B, context) token ids of CLIP's own tokenizer, padded with zeros."""
    return open_clip.tokenize(captions, context_length=context)


def normalise(pictures: np.ndarray) -> Tensor:
    """(B, H, W, 3) uint8 -> (B, 3, H, W) in the range the model expects (-1..1)."""
    return torch.from_numpy(pictures).permute(0, 3, 1, 2).float().div(127.5).sub(1)


def vary_caption(caption: str, names: list[str], draw: np.random.Generator) -> str:
    """The whole caption, or only its things, or one thing: users' prompts vary."""
    chance = draw.random()
    if chance < 0.7:
        return caption
    if chance < 0.85:
        phrases = [phrase for phrase in map(background_phrase, BACKGROUNDS) if caption.endswith(phrase)]
        return caption.removesuffix(" " + phrases[0])
    return f"a picture of {article(names[int(draw.integers(len(names)))])}"


def train(model: CLIP, pool: ScenePool, context: int, budget: Budget, folder: Path, device: str, seed: int,
          batch: int = 96) -> CLIP:  # fmt: skip
    """Symmetric contrastive loss over batches of the pool's scenes, with light pixel noise."""
    model.to(device)
    stage = Stage("clip", model, budget, folder, weight_decay=0.1)
    grounds: dict[str, np.ndarray] = {}

    def loss(step: int, progress: float) -> Tensor:
        if step % 100 == 0 or not grounds:
            pool.refresh()
            grounds.update(_by_ground(pool.captions))
        draw = np.random.default_rng((seed, step))
        index = _alike(grounds, batch, draw)
        tokens = tokenise([vary_caption(pool.captions[i], pool.names[i], draw) for i in index], context)
        images = normalise(pool.take(index))
        if draw.random() < progress:
            images = _moved(images, draw)
        images = (images + torch.randn(images.shape) * float(draw.uniform(0, 0.12))).to(device)
        with autocast(device):
            image, text, scale = model(images, tokens.to(device))[:3]
        logits = scale.float().clamp(max=100) * image.float() @ text.float().T
        # Equal captions are not negatives of each other.
        same = (tokens[:, None] == tokens[None]).all(-1) & ~torch.eye(batch, dtype=torch.bool)
        logits = logits.masked_fill(same.to(device), -1e4)
        target = torch.arange(batch, device=device)
        return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2

    # On CPUs the fused attention's backward pass takes twice the time of the plain one.
    with sdpa_kernel(SDPBackend.MATH) if device == "cpu" else nullcontext():
        stage.train(loss)
    stage.use_average()
    return model


def _by_ground(captions: list[str]) -> dict[str, np.ndarray]:
    """Numbers of the captions by the background that they name."""
    found: dict[str, list[int]] = {ground: [] for ground in BACKGROUNDS}
    ends = {background_phrase(ground): ground for ground in BACKGROUNDS}
    for number, caption in enumerate(captions):
        found[next(ground for end, ground in ends.items() if caption.endswith(end))].append(number)
    return {ground: np.array(numbers) for ground, numbers in found.items() if numbers}


def _alike(grounds: dict[str, np.ndarray], batch: int, draw: np.random.Generator) -> np.ndarray:
    """Numbers of a batch's scenes, most batches from one or two backgrounds only.

    Else the background alone tells most of a batch apart, and for long nothing is learned about things (LOG.md).
    """
    few = int(draw.choice([1, 2, len(grounds)], p=[0.5, 0.25, 0.25]))
    chosen = draw.choice(list(grounds), min(few, len(grounds)), replace=False)
    return draw.choice(np.concatenate([grounds[str(ground)] for ground in chosen]), batch)


def _moved(images: Tensor, draw: np.random.Generator) -> Tensor:
    """The batch shifted by up to half a patch of the scenes' grid, edges repeated: subjects stand off the grid."""
    reach = GRID // 2
    x, y = draw.integers(0, 2 * reach + 1, 2)
    size = images.shape[-1]
    return F.pad(images, (reach,) * 4, mode="replicate")[..., y : y + size, x : x + size]


def save(model: CLIP, folder: Path, size: int, context: int) -> None:
    """Write an ordinary ``local-dir:`` folder of open_clip, fp16."""
    folder.mkdir(parents=True, exist_ok=True)
    document = {
        "model_cfg": config(size, context),
        "preprocess_cfg": {"size": size, "mode": "RGB", "mean": MEAN, "std": STD, "interpolation": "bicubic",
                           "resize_mode": "shortest"},
    }  # fmt: skip
    (folder / "open_clip_config.json").write_text(json.dumps(document, indent=2) + "\n")
    state = {key: value.detach().half().contiguous() for key, value in model.state_dict().items()}
    save_file(state, folder / "open_clip_model.safetensors", {"format": "pt"})


def text_encoder(model: CLIP, context: int) -> CLIPTextModel:
    """The text tower as a transformers CLIPTextModel, weight for weight (pre-projection hidden states)."""
    width, layers, heads = 192, 4, 4
    encoder = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=49408, hidden_size=width, intermediate_size=4 * width, num_hidden_layers=layers,
            num_attention_heads=heads, max_position_embeddings=context, hidden_act="gelu", projection_dim=width,
            bos_token_id=49406, eos_token_id=49407, pad_token_id=0,
        )
    )  # fmt: skip
    source, state = model.state_dict(), {}
    state["embeddings.token_embedding.weight"] = source["token_embedding.weight"]
    state["embeddings.position_embedding.weight"] = source["positional_embedding"]
    for part in ("weight", "bias"):
        state[f"final_layer_norm.{part}"] = source[f"ln_final.{part}"]
        for layer in range(layers):
            there, here = f"transformer.resblocks.{layer}", f"encoder.layers.{layer}"
            rows = source[f"{there}.attn.in_proj_{part}"].chunk(3)
            for name, value in zip(("q_proj", "k_proj", "v_proj"), rows, strict=True):
                state[f"{here}.self_attn.{name}.{part}"] = value
            for ours, theirs in (
                ("self_attn.out_proj", "attn.out_proj"),
                ("layer_norm1", "ln_1"),
                ("layer_norm2", "ln_2"),
                ("mlp.fc1", "mlp.c_fc"),
                ("mlp.fc2", "mlp.c_proj"),
            ):
                state[f"{here}.{ours}.{part}"] = source[f"{there}.{theirs}.{part}"]
    prefix = "text_model." if any(key.startswith("text_model.") for key in encoder.state_dict()) else ""
    encoder.load_state_dict({prefix + key: value for key, value in state.items()}, strict=False)
    missing = {k for k in encoder.state_dict() if "position_ids" not in k} - {prefix + key for key in state}
    assert not missing, missing
    return encoder.eval()
