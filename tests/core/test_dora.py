"""DoRA: W' = m ⊙ (W + ΔW) / ‖W + ΔW‖, whoever wrote the file; against the definition, PEFT and diffusers."""

from __future__ import annotations

import copy
import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from safetensors.torch import save, save_file

from mole_diffusion.errors import InvalidFile
from mole_diffusion.experts import Expert, LowRank, content_hash, inspect_file, save_expert
from tests.core.small import make_sd, run_unet, shapes_of

Q = "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn1_to_q"
QUERY = "unet.down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"
TARGETS = ["attn2.to_q", "ff.net.2", "conv1"]


def r(*shape: int) -> torch.Tensor:
    return torch.randn(*shape)


def defined(weight: torch.Tensor, delta: torch.Tensor, magnitude: torch.Tensor) -> torch.Tensor:
    """Row by row, in fp64."""
    changed = (weight + delta).double()
    rows = [m * row / row.square().sum().sqrt() for m, row in zip(magnitude.double(), changed, strict=True)]
    return torch.stack(rows).float()


def with_expert(pipe: Any, expert: Expert) -> Any:
    """The pipeline with the expert's weights computed by the definition."""
    for key, pair in expert.modules.items():
        component, _, path = key.partition(".")
        layer = getattr(pipe, component).get_submodule(path)
        fitted = pair.reshaped(tuple(layer.weight.shape))
        assert fitted is not None
        delta = fitted.delta()
        new = layer.weight + delta if pair.magnitude is None else defined(layer.weight, delta, pair.magnitude)
        layer.weight.data.copy_(new)
    return pipe


@pytest.mark.parametrize(
    ("prefix", "key", "down", "up", "scale_shape"),
    [
        (Q, QUERY, (3, 8), (6, 3), (6, 1)),
        (Q, QUERY, (3, 8), (6, 3), (6,)),
        ("lora_unet_conv_in", "unet.conv_in", (3, 8, 3, 3), (6, 3, 1, 1), (6, 1, 1, 1)),
        # as many inputs as outputs: the shape still tells the axis
        (Q, QUERY, (3, 6), (6, 3), (6, 1)),
    ],
)
def test_dora_scale_of_lycoris_and_onetrainer(
    prefix: str, key: str, down: tuple[int, ...], up: tuple[int, ...], scale_shape: tuple[int, ...]
) -> None:
    """Origin: LyCORIS modules/locon.py with wd_on_out, OneTrainer LoRAModule.py with decompose_output_axis."""
    a, b, m = r(*down), r(*up), torch.rand(scale_shape) + 0.5
    tensors = {f"{prefix}.lora_down.weight": a, f"{prefix}.lora_up.weight": b, f"{prefix}.dora_scale": m}
    pair = Expert.load(save({**tensors, f"{prefix}.alpha": torch.tensor(1.5)})).modules[key]
    delta = 0.5 * (b.flatten(1) @ a.flatten(1)).reshape(6, *down[1:])
    torch.testing.assert_close(pair.delta(), delta)
    assert pair.magnitude is not None and torch.equal(pair.magnitude, m.flatten())
    weight = r(6, *down[1:])
    torch.testing.assert_close(pair.applied_to(weight), defined(weight, delta, m.flatten()))
    assert torch.equal(LowRank(pair.a, pair.b, pair.scale).applied_to(weight), weight + pair.delta())


def test_the_products_of_lycoris_may_have_a_magnitude() -> None:
    a1, b1, a2, b2, m = r(6, 2), r(2, 8), r(6, 2), r(2, 8), torch.rand(6, 1)
    parts = {"hada_w1_a": a1, "hada_w1_b": b1, "hada_w2_a": a2, "hada_w2_b": b2, "dora_scale": m}
    pair = Expert.load(save({f"{Q}.{name}": tensor for name, tensor in parts.items()})).modules[QUERY]
    weight = r(6, 8)
    torch.testing.assert_close(pair.applied_to(weight), defined(weight, (a1 @ b1) * (a2 @ b2), m.flatten()))


@pytest.mark.parametrize(
    ("shape", "part"),
    [((1, 8), "per input"), ((1, 6), "per input"), ((8, 1), "expected 6 numbers"), ((6, 8), "expected 6 numbers"),
     ((1,), "expected 6 numbers"), ((), "expected 6 numbers"), ((3, 2), "expected 6 numbers")],
)  # fmt: skip
def test_other_axes_and_shapes_are_refused(shape: tuple[int, ...], part: str) -> None:
    tensors = {f"{Q}.lora_down.weight": r(3, 8), f"{Q}.lora_up.weight": r(6, 3), f"{Q}.dora_scale": torch.ones(shape)}
    with pytest.raises(InvalidFile, match=part):
        Expert.load(save(tensors))
    assert part in inspect_file(save(tensors), header_only=True).reason


def test_a_magnitude_without_its_pair_is_refused() -> None:
    with pytest.raises(InvalidFile, match=r"1 of 1 tensors.*lora_magnitude_vector"):
        Expert.load(save({"unet.conv_in.lora_magnitude_vector": r(6)}))
    with pytest.raises(InvalidFile, match="one number per output"):
        LowRank(r(2, 8), r(6, 2), 1.0, r(8))


@pytest.mark.parametrize("options", [{}, {"use_rslora": True}, {"alpha_pattern": {"attn2.to_q": 1}}])
def test_a_dora_folder_of_peft_gives_the_weights_that_peft_merges(options: dict[str, Any], tmp_path: Path) -> None:
    asked = LoraConfig(
        r=2, lora_alpha=5, target_modules=TARGETS, init_lora_weights=False, use_dora=True, bias="none", **options
    )
    unet = make_sd().unet
    model = get_peft_model(copy.deepcopy(unet), asked)
    for name, parameter in model.named_parameters():
        if "magnitude" in name:
            parameter.data.mul_(1.3)
    model.save_pretrained(str(tmp_path / "hero"))
    expert = Expert.load(tmp_path / "hero")
    merged = model.merge_and_unload()
    assert expert.dora == len(expert.modules) > 10
    for key, pair in expert.modules.items():
        path = key.removeprefix("unet.")
        ours = pair.applied_to(unet.get_submodule(path).weight.data)
        torch.testing.assert_close(ours, merged.get_submodule(path).weight.data, atol=1e-5, rtol=1e-5)
    config = tmp_path / "hero" / "adapter_config.json"
    assert json.loads(config.read_text())["use_dora"]


def test_a_configuration_that_says_dora_needs_every_magnitude() -> None:
    tensors = {"unet.conv_in.lora_A.weight": r(2, 4, 3, 3), "unet.conv_in.lora_B.weight": r(8, 2, 1, 1)}
    config = {"lora_adapter_metadata": json.dumps({"unet.r": 2, "unet.lora_alpha": 2, "unet.use_dora": True})}
    with pytest.raises(InvalidFile, match="no lora_magnitude_vector"):
        Expert.load(save(tensors, config))
    whole = {**tensors, "unet.conv_in.lora_magnitude_vector": r(1, 8, 1, 1)}
    assert Expert.load(save(whole, config)).dora == 1
    renamed = {**tensors, "unet.conv_in.lora_magnitude_vector.default.weight": r(1, 8, 1, 1)}
    assert Expert.load(save(renamed)).dora == 1


def dora_expert(pipe: Any) -> Expert:
    """Trained magnitudes on linear layers and convolutions, one scale per module."""
    torch.manual_seed(5)
    modules = {}
    for index, (key, shape) in enumerate(shapes_of(pipe).items()):
        if key.startswith("unet.") and key.endswith(tuple(TARGETS)):
            a, b = 0.3 * r(2, *shape[1:]), 0.3 * r(shape[0], 2)
            modules[key] = LowRank(a, b, 0.5 + 0.1 * (index % 5), torch.rand(shape[0]) + 0.5)
    return Expert("dora", modules)


@pytest.mark.parametrize("file_format", ["diffusers", "kohya"])
def test_saved_and_read_back(file_format: Any, tmp_path: Path) -> None:
    expert = dora_expert(make_sd())
    path = save_expert(expert, tmp_path / "d.safetensors", format=file_format)
    again = Expert.load(path)
    assert again.modules.keys() == expert.modules.keys()
    for key, pair in expert.modules.items():
        found = again.modules[key]
        torch.testing.assert_close(found.delta(), pair.delta())
        assert found.magnitude is not None and pair.magnitude is not None
        assert torch.equal(found.magnitude, pair.magnitude)
    for header_only in (False, True):
        seen = inspect_file(path, header_only=header_only)
        assert seen.ok and seen.dora == len(expert.modules) and seen.sentence().startswith("A DoRA for")


@pytest.mark.filterwarnings("ignore:The following alpha_pattern keys")
def test_diffusers_reads_our_diffusers_export_the_same_and_drops_the_magnitude_of_kohya(tmp_path: Path) -> None:
    """Where diffusers is right we are equal; a kohya DoRA it applies without its magnitude: another picture."""
    expert = dora_expert(make_sd())
    expected = run_unet(with_expert(make_sd(), expert))
    plain = Expert("plain", {k: LowRank(p.a, p.b, p.scale) for k, p in expert.modules.items()})
    without = run_unet(with_expert(make_sd(), plain))
    assert (expected - without).abs().max() > 0.01
    for file_format, theirs in (("diffusers", expected), ("kohya", None)):
        path = save_expert(expert, tmp_path / f"{file_format}.safetensors", format=file_format)  # type: ignore[arg-type]
        torch.testing.assert_close(run_unet(with_expert(make_sd(), Expert.load(path))), expected, atol=1e-5, rtol=1e-5)
        pipe = make_sd()
        pipe.load_lora_weights(str(tmp_path), weight_name=path.name)
        found = run_unet(pipe)
        if theirs is None:
            assert (found - expected).abs().max() > 0.01
        else:
            torch.testing.assert_close(found, theirs, atol=1e-5, rtol=1e-5)


def test_a_dora_that_diffusers_saved(tmp_path: Path) -> None:
    pipe = make_sd()
    pipe.unet.add_adapter(LoraConfig(r=2, lora_alpha=2, target_modules=TARGETS, init_lora_weights=False, use_dora=True))
    pipe.save_lora_weights(tmp_path, unet_lora_layers=get_peft_model_state_dict(pipe.unet))
    expert = Expert.load(tmp_path / "pytorch_lora_weights.safetensors")
    torch.testing.assert_close(run_unet(with_expert(make_sd(), expert)), run_unet(pipe), atol=1e-5, rtol=1e-5)


def test_a_flat_kernel_and_a_1x1_convolution_keep_their_magnitude() -> None:
    flat = LowRank(r(2, 72), r(6, 2), 1.0, r(6)).reshaped((6, 8, 3, 3))
    single = LowRank(r(2, 8, 1, 1), r(6, 2), 1.0, r(6)).reshaped((6, 8))
    assert flat is not None and single is not None and flat.magnitude is not None and single.magnitude is not None


def test_the_content_hash_knows_the_magnitude_and_is_what_it_was_without() -> None:
    a, b = r(2, 3), r(4, 2)
    before = hashlib.sha256(b"unet.x|(2, 3)|(4, 2)|0.5|" + a.numpy().tobytes() + b.numpy().tobytes()).hexdigest()
    assert content_hash({"unet.x": LowRank(a, b, 0.5)}) == before
    hashes = {before, *(content_hash({"unet.x": LowRank(a, b, 0.5, m)}) for m in (torch.ones(4), torch.zeros(4)))}
    assert len(hashes) == 3


def test_a_magnitude_that_is_not_finite_is_refused(tmp_path: Path) -> None:
    tensors = {f"{Q}.lora_down.weight": r(3, 8), f"{Q}.lora_up.weight": r(6, 3), f"{Q}.dora_scale": r(6, 1) / 0}
    save_file(tensors, tmp_path / "x.safetensors")
    with pytest.raises(InvalidFile, match="NaN or infinity"):
        Expert.load(tmp_path / "x.safetensors")
    huge = {**tensors, f"{Q}.dora_scale": torch.full((6, 1), 1e200, dtype=torch.float64)}
    with pytest.raises(InvalidFile, match="too large"):
        Expert.load(save(huge))
