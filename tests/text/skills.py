"""Two tasks told apart by the first token of the prompt: copy the symbols, or mirror each of them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mole_diffusion import Expert
from mole_diffusion.text import from_peft
from tests.text.small import MAKERS, TARGETS, VOCABULARY

TASKS = (0, 1)
FIRST, LENGTH, WIDTH = 4, 1, 32


def batch_of(kind: str, tasks: Tensor, random: torch.Generator) -> dict[str, Tensor]:
    """One prompt per task (0 = copy, 1 = mirror): [task token, symbols], and the answer as labels."""
    symbols = torch.randint(FIRST, VOCABULARY, (len(tasks), LENGTH), generator=random)
    mirrored = VOCABULARY - 1 + FIRST - symbols
    answers = torch.where(tasks.unsqueeze(1) == 0, symbols, mirrored)
    prompts = torch.cat([(2 + tasks).unsqueeze(1), symbols], 1)
    if kind == "t5":
        return {"input_ids": prompts, "attention_mask": torch.ones_like(prompts), "labels": answers}
    ids = torch.cat([prompts, answers], 1)
    labels = torch.cat([torch.full_like(prompts, -100), answers], 1)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


def skilled(kind: str, task: int, steps: int = 60) -> Expert:
    """A LoRA that learned one task alone."""
    from peft import LoraConfig, get_peft_model

    base = MAKERS[kind](layers=1, width=WIDTH)
    torch.manual_seed(task)
    config = LoraConfig(r=4 + 4 * task, lora_alpha=16, target_modules=[t for t in TARGETS[kind] if t != "lm_head"])
    model: Any = get_peft_model(base, config).eval()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-2)
    random = torch.Generator().manual_seed(task)
    for _ in range(steps):
        optimizer.zero_grad()
        model(**batch_of(kind, torch.full((32,), task), random)).loss.backward()
        optimizer.step()
    return from_peft(model, ("copy", "mirror")[task])
