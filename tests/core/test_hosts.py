"""What experts can be put on, what is refused with a sentence, and what a host says of its model."""

from __future__ import annotations

import copy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import accelerate
import pytest
import torch
from accelerate.hooks import remove_hook_from_module
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from mole_diffusion import Expert, GateConfig, TriggerSpans, compose
from mole_diffusion.composition import nla
from mole_diffusion.errors import InvalidRequest
from mole_diffusion.experts import save_expert
from mole_diffusion.hosts import host_for
from mole_diffusion.prompts import Conditions, prompt_spans
from tests.core.small import (
    HOSTS,
    SD_TARGETS,
    generate,
    main_of,
    make_expert,
    make_module,
    make_pixart,
    make_sd,
    make_sd3,
    randomise,
    run_model,
)


def two(pipe: Any, targets: tuple[str, ...] = SD_TARGETS) -> list[Expert]:
    return [
        make_expert(pipe, name, seed=seed, targets=targets, size=0.1) for seed, name in enumerate(("robot", "bunny"))
    ]


@pytest.mark.parametrize("host", ["sd", "sdxl", "pixart", "sd3"])
@torch.no_grad()
def test_a_bare_denoiser_is_as_good_as_its_pipeline(host: str) -> None:
    pipe = HOSTS[host]()
    composition = compose(pipe, two(pipe), gate=GateConfig(scope="token"))
    randomise(composition)
    with composition:
        composition.condition(["nobody", "nothing"], guidance=False)
        expected = run_model(pipe)
    bare = compose(main_of(pipe), two(pipe), gate=GateConfig(scope="token"))
    bare.load_state_dict(composition.state_dict())
    with bare:
        bare.condition(None, guidance=False)
        if bare.gate.needs_spans and host != "sd3":
            with pytest.raises(InvalidRequest, match="needs the prompts"):
                run_model(pipe)
        spans = torch.zeros(2, 24, 2, dtype=torch.bool)
        bare._context.announce(Conditions(False, spans))
        assert torch.equal(run_model(pipe), expected)


@pytest.mark.parametrize("host", ["sd", "sdxl", "pixart", "sd3"])
def test_pipelines_generate_and_masks_are_the_base(host: str) -> None:
    pipe = HOSTS[host]()
    before = generate(pipe)
    composition = compose(pipe, two(pipe, (*SD_TARGETS, "q_proj", "SelfAttention.q")), gate=GateConfig(scope="token"))
    randomise(composition)
    with composition:
        changed = generate(pipe)
        assert changed.isfinite().all() and not torch.allclose(changed, before, atol=1e-3)
        assert composition._context.conditions.guidance and composition.trace().steps == 2
        composition.mask("robot", "bunny")
        assert torch.equal(generate(pipe), before)
    assert torch.equal(generate(pipe), before)


@pytest.mark.parametrize("host", ["sd", "sdxl", "pixart", "sd3"])
@pytest.mark.parametrize("size", [(8, 8), (12, 10)])
@torch.no_grad()
def test_strides_say_how_many_tokens_each_block_has(host: str, size: tuple[int, int]) -> None:
    pipe, seen = HOSTS[host](), {}
    blocks = host_for(pipe).blocks()
    assert len(blocks) >= 2

    def note(name: str) -> Any:
        def hook(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            parts = output if isinstance(output, tuple) else (output,)
            given = args[0] if args else kwargs["hidden_states"]
            like = next(
                part for part in parts if (part is not None and part.shape[:2] == given.shape[:2]) or part is output
            )
            seen[name] = like.shape[2:].numel() if like.ndim == 4 else like.shape[1]
            width = next(block.out_width or block.width for block in blocks if block.name == name)
            assert width == (like.shape[1] if like.ndim == 4 else like.shape[2])

        return hook

    for block in blocks:
        main_of(pipe).get_submodule(block.name).register_forward_hook(note(block.name), with_kwargs=True)
    run_model(pipe, size=size)
    for block in blocks:
        assert seen[block.name] == -(-size[0] // block.stride) * -(-size[1] // block.stride), block


def test_pixart_lowers_its_prompts_before_a_tokenizer_that_tells_capitals_apart() -> None:
    pipe = make_pixart()
    experts = [make_expert(pipe, "Robot", trigger="Robot"), make_expert(pipe, "bunny", seed=1)]
    spans = prompt_spans(pipe, ["A robot or a ROBOT", "a bunny"], experts)
    assert spans[0, :, 0].sum() == 10 and not spans[0, :, 1].any() and spans[1, :, 1].sum() == 5
    with compose(pipe, experts, gate=TriggerSpans()) as composition:
        generate(pipe, "A ROBOT")
        record = next(iter(composition._context.records.values()))
        assert record.probabilities[0, :, 0].eq(1).sum() == 5
    pipe.tokenizer.model_max_length = 512  # a T5's own limit, longer than the pipeline's
    assert prompt_spans(pipe, ["a robot", "a"], experts).shape[1] < 24


def test_flux_reads_its_t5() -> None:
    pixart, sd = make_pixart(), make_sd()
    both = SimpleNamespace(tokenizer=sd.tokenizer, tokenizer_2=pixart.tokenizer, encode_prompt=pixart.encode_prompt)
    expected = prompt_spans(
        SimpleNamespace(tokenizer=pixart.tokenizer, encode_prompt=pixart.encode_prompt), ["a bunny"], two(sd)
    )
    assert torch.equal(prompt_spans(both, ["a bunny"], two(sd)), expected)


class Plain(nn.Module):
    """Linear layers only, from channels to channels."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(6, 8), nn.GELU(), nn.Linear(8, 6))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


@pytest.mark.parametrize("shape", [(2, 6), (2, 5, 6)])
@pytest.mark.parametrize("scope", ["sample", "token"])
@torch.no_grad()
def test_any_module(shape: tuple[int, ...], scope: Any) -> None:
    torch.manual_seed(0)
    model, x = Plain(), torch.randn(shape)
    before, experts = model(x), two(model, ("layers.0", "layers.2"))
    expected = copy.deepcopy(model)
    for path in ("layers.0", "layers.2"):
        weight: Any = expected.get_submodule(path).weight
        weight += sum(0.5 * expert.modules[f"module.{path}"].delta() for expert in experts)
    composition = compose(model, experts, gate=GateConfig(scope=scope))
    with composition:
        torch.testing.assert_close(model(x), expected(x), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(model(x=x), expected(x), rtol=1e-5, atol=1e-6)
        composition.mask("robot", "bunny")
        assert torch.equal(model(x), before)
    with pytest.raises(InvalidRequest, match="no tokenizer"), compose(model, experts, gate=TriggerSpans()) as spans:
        spans.condition(["a robot"], guidance=False)


def test_what_is_no_model_is_refused() -> None:
    expert = make_expert(make_module(), "robot", targets=("head.0",))
    for target in (None, 7, SimpleNamespace(unet=None)):
        with pytest.raises(InvalidRequest, match="can be composed on"):
            compose(target, [expert])
    layer = nn.Linear(4, 4)
    with pytest.raises((InvalidRequest, Exception), match=r"single Linear|does not fit"):
        compose(layer, [expert]).attach()


@pytest.mark.parametrize("host", ["sd", "pixart"])
def test_fused_projections_are_refused_until_they_are_separate(host: str) -> None:
    pipe = HOSTS[host]()
    model: Any = main_of(pipe)
    composition = compose(pipe, two(pipe))
    model.fuse_qkv_projections()
    with pytest.raises(InvalidRequest, match="unfuse_qkv_projections"):
        composition.attach()
    assert not composition.attached
    model.unfuse_qkv_projections()
    with composition, torch.no_grad():
        composition.mask("robot", "bunny")
        run_model(pipe)


def test_loaded_adapters_are_refused(tmp_path: Path) -> None:
    pipe = make_sd()
    experts = two(pipe)
    path = save_expert(experts[0], tmp_path / "robot.safetensors")
    pipe.load_lora_weights(str(tmp_path), weight_name=path.name)
    with pytest.raises(InvalidRequest, match="unload_lora_weights"):
        compose(pipe, experts)
    pipe.unload_lora_weights()
    whole = pipe.unet
    pipe.unet = get_peft_model(whole, LoraConfig(r=2, target_modules=["to_q"]))
    for target in (pipe, pipe.unet):
        with pytest.raises(InvalidRequest, match=r"model\.unload\(\)"):
            compose(target, experts)
    pipe.unet = pipe.unet.unload()
    with compose(pipe, experts):
        generate(pipe)


def test_adapters_that_come_after_composing_are_refused_too() -> None:
    pipe = make_sd()
    composition = compose(pipe, two(pipe))
    pipe.unet.add_adapter(LoraConfig(r=2, target_modules=["to_q"]))
    with pytest.raises(InvalidRequest, match="unload_lora_weights"):
        composition.attach()


@pytest.mark.parametrize("component", ["unet", "text_encoder"])
def test_weights_that_are_not_in_memory_are_refused(component: str) -> None:
    """Sequential offload leaves a module without its weights between calls."""
    pipe = make_sd()
    composition = compose(pipe, two(pipe, (*SD_TARGETS, "q_proj")))
    accelerate.cpu_offload(getattr(pipe, component), torch.device("cpu"))
    with pytest.raises(InvalidRequest, match=f"weights of {component} are not in memory"):
        composition.attach()
    with pytest.raises(InvalidRequest, match="enable_model_cpu_offload"), compose(pipe, two(pipe)):
        pass
    assert not composition.attached


def test_whole_models_may_come_and_go() -> None:
    """What enable_model_cpu_offload does, by its own hooks; here both devices are the processor."""
    pipe = make_sd()
    composition = compose(pipe, two(pipe, (*SD_TARGETS, "q_proj", "conv1")), gate=GateConfig(scope="token"))
    randomise(composition)
    with composition:
        expected = generate(pipe)
    hook = None
    for component in (pipe.text_encoder, pipe.unet):
        _, hook = accelerate.cpu_offload_with_hook(component, torch.device("cpu"), prev_module_hook=hook)
    with composition:
        assert torch.equal(generate(pipe), expected)
        assert hook is not None
        hook.offload()
        assert torch.equal(generate(pipe), expected)
    for component in (pipe.text_encoder, pipe.unet):
        remove_hook_from_module(component)
    with compose(pipe, two(pipe), gate=nla(2)):
        generate(pipe)


def test_the_last_joint_block_has_no_text_side() -> None:
    pipe = make_sd3()
    specs = {block.name: block for block in host_for(pipe).blocks()}
    assert [spec.text_width for spec in specs.values()] == [16, 16]
    only = make_expert(pipe, "robot", targets=("ff_context.net.2",))
    composition = compose(pipe, [only, make_expert(pipe, "bunny", seed=1, targets=("ff_context.net.2",))],
                          gate=GateConfig(scope="token", input="energy"))  # fmt: skip
    assert [block.text_width for block in composition.plan.blocks] == [64]
    randomise(composition)
    with composition, torch.no_grad():
        composition.condition(["a robot", "a bunny"], guidance=False)
        run_model(pipe)
        assert list(composition._context.records) == ["transformer_blocks.0:text"]


@pytest.mark.parametrize("host", ["sd", "pixart"])
@pytest.mark.parametrize("scope", ["sample", "token"])
@torch.no_grad()
def test_text_may_run_before_the_image_where_gates_look_at_sites(host: str, scope: Any) -> None:
    """Keys and values of the text, then the feed-forward: its places are those of the image."""
    pipe = HOSTS[host]()
    composition = compose(
        pipe, two(pipe, ("attn2.to_k", "attn2.to_v", "ff.net.2")), gate=GateConfig(scope=scope, input="energy")
    )
    randomise(composition)
    with composition:
        composition.condition(["a robot", "a bunny"], guidance=False)
        assert run_model(pipe).isfinite().all()
        for name, record in composition._context.records.items():
            places = 1 if scope == "sample" else 24 if name.endswith(":text") else 16
            assert record.probabilities.shape[1] == places, name
