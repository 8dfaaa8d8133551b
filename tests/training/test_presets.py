"""Presets are defaults of both tasks, and what is given wins; memory is counted."""

from __future__ import annotations

import pytest

from mole_diffusion.bases import get_base
from mole_diffusion.errors import InvalidRequest
from training.cli.subject import preset_lines
from training.config import parse
from training.memory import estimate
from training.presets import PRESETS
from training.tasks.gate import GateTrainingConfig
from training.tasks.subject import SubjectConfig

WHO = {"base": "sdxl", "token": "zwx", "class": "dog"}


@pytest.mark.parametrize("name", PRESETS)
def test_presets_parse_for_both_tasks(name: str) -> None:
    subject = SubjectConfig.of(name, **WHO)
    gate = parse(GateTrainingConfig, {**PRESETS[name].settings("gate"), "base": "sdxl"})
    assert (subject.resolution, subject.batch) == (gate.resolution, gate.batch)
    assert estimate(get_base("sdxl"), subject).gib < PRESETS[name].memory_gb
    assert PRESETS[name].trades.endswith(".")


def test_what_is_given_wins() -> None:
    given = SubjectConfig.of("24gb", **WHO, rank=3, accumulate=1)
    assert (given.rank, given.accumulate, given.batch, given.targets) == (3, 1, 2, "all")
    assert SubjectConfig.of(None, **WHO) == parse(SubjectConfig, WHO)
    with pytest.raises(InvalidRequest, match="a preset out of 8gb"):
        SubjectConfig.of("1gb", **WHO)


def test_the_papers_recipe_as_plain_lora_has_no_mixer() -> None:
    config = SubjectConfig.of("paper-moslora-sdxl", token="zwx", adapter="lora", **{"class": "dog"})
    assert (config.adapter, config.mixer, config.rank, config.steps) == ("lora", None, 4, 500)


def test_the_papers_recipe() -> None:
    recipe = SubjectConfig.of("paper-moslora-sdxl", token="sks", **{"class": "dog"})
    assert (recipe.base, recipe.adapter, recipe.mixer, recipe.rank, recipe.alpha) == (
        "sdxl", "moslora", "orthogonal", 4, None,
    )  # fmt: skip
    assert (recipe.lr, recipe.schedule, recipe.batch, recipe.accumulate, recipe.steps) == (1e-4, "constant", 1, 4, 500)
    assert (recipe.targets, recipe.train_text_encoders, recipe.resolution) == ("attention", False, 1024)


def test_counts() -> None:
    base = get_base("sdxl")
    plain = estimate(base, SubjectConfig.of("16gb", **WHO))
    assert 6.5e9 < plain.weights < 7.0e9  # 2.6 + 0.8 billion parameters and the autoencoder, two bytes each
    assert plain.adapter == plain.optimiser
    assert estimate(base, SubjectConfig.of("16gb", **WHO, optimiser="adamw8bit")).optimiser == plain.optimiser / 4
    assert estimate(base, SubjectConfig.of("16gb", **WHO, batch=2)).activations == 2 * plain.activations
    kept = estimate(base, SubjectConfig.of("16gb", **WHO, checkpointing=False))
    assert kept.activations > 5 * plain.activations and kept.weights == plain.weights
    away = estimate(base, SubjectConfig.of("16gb", **WHO, offload=True))
    assert away.weights < 5.5e9 and away.preparation == plain.preparation


def test_presets_are_listed_with_estimates() -> None:
    title, *lines = preset_lines()
    assert "estimated" in title and [line.split()[0] for line in lines] == list(PRESETS)
    assert all(" about " in line and " GiB" in line for line in lines)
