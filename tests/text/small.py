"""Tiny real language models, built from configs with random weights, and random experts for them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mole_diffusion import Expert
from mole_diffusion.composition import Composition

VOCABULARY, WIDTH, PAD, END = 24, 16, 0, 1
TARGETS = {
    "llama": ["q_proj", "v_proj", "o_proj", "gate_proj", "down_proj", "lm_head"],
    "t5": ["q", "k", "v", "o", "wi", "wo", "lm_head"],
}
FEW = {"llama": ["q_proj", "v_proj"], "t5": ["q", "v"]}


def make_llama(layers: int = 2, width: int = WIDTH) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=layers,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=64,
        pad_token_id=PAD,
        bos_token_id=2,
        eos_token_id=END,
        initializer_range=0.3,
    )
    return LlamaForCausalLM(config).eval()


def make_t5(layers: int = 2, width: int = WIDTH, dropout_rate: float = 0.1) -> Any:
    from transformers import T5Config, T5ForConditionalGeneration

    torch.manual_seed(0)
    config = T5Config(
        vocab_size=VOCABULARY,
        d_model=width,
        d_kv=width // 4,
        d_ff=2 * width,
        num_layers=layers,
        num_heads=2,
        pad_token_id=PAD,
        eos_token_id=END,
        decoder_start_token_id=PAD,
        initializer_factor=1.0,
        dropout_rate=dropout_rate,
        tie_word_embeddings=False,
    )
    return T5ForConditionalGeneration(config).eval()


MAKERS = {"llama": make_llama, "t5": make_t5}


def peft_model(kind: str, seed: int, *, few: bool = False, rank: int = 2, size: float = 0.3, **more: Any) -> Any:
    """A PeftModel with one random adapter; ``few``: fewer targets."""
    from peft import LoraConfig, get_peft_model

    targets = (FEW if few else TARGETS)[kind]
    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=targets, **more)
    model = get_peft_model(MAKERS[kind](), config)
    random = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = torch.randn(parameter.shape, generator=random) * size
    return model.eval()


def saved_expert(kind: str, folder: Path, name: str, seed: int, **more: Any) -> Expert:
    """A random adapter, as a folder of PEFT."""
    model = peft_model(kind, seed, **more)
    model.save_pretrained(str(folder / name), save_embedding_layers=False)
    return Expert.load(folder / name)


def batch(kind: str, rows: int = 3, length: int = 6, *, answers: bool = False, seed: int = 5) -> dict[str, Tensor]:
    """Prompts of different lengths, padded on the left; with answers to learn."""
    random = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, VOCABULARY, (rows, length), generator=random)
    mask = torch.arange(length) >= torch.arange(rows).unsqueeze(1)
    ids = torch.where(mask, ids, PAD)
    if not answers:
        return {"input_ids": ids, "attention_mask": mask.long()}
    more = torch.randint(3, VOCABULARY, (rows, 3), generator=random)
    if kind == "t5":
        return {"input_ids": ids, "attention_mask": mask.long(), "labels": more}
    labels = torch.cat([torch.full_like(ids, -100), more], 1)
    mask = torch.cat([mask, torch.ones_like(more, dtype=torch.bool)], 1)
    return {"input_ids": torch.cat([ids, more], 1), "attention_mask": mask.long(), "labels": labels}


def logits(model: Any, kind: str, **more: Any) -> Tensor:
    with torch.no_grad():
        return model(**batch(kind, answers=True, **more)).logits


def randomise(composition: Composition, seed: int = 3, size: float = 1.0) -> None:
    random = torch.Generator().manual_seed(seed)
    for parameter in composition.parameters():
        parameter.data += torch.randn(parameter.shape, generator=random) * size
