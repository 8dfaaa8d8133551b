from __future__ import annotations

import numpy as np
import open_clip
import pytest
import torch
from torch import nn

from training.base import autoencoder, clip, diffusion
from training.base.fastconv import small_maps_as_products
from training.base.judge import Judge
from training.base.muon import MATRIX_RATE, MuonAdamW
from training.base.precision import autocast, bf16_pays
from training.base.quality import measure, protocol, real_scenes
from training.base.scenes import BACKGROUNDS, background_phrase, compose_scene
from training.base.stage import Budget, Stage


@pytest.fixture(scope="module")
def pictures(things):
    rng = np.random.default_rng(1)
    names = list(things)
    scenes = [compose_scene(things, [names[i % 12]], BACKGROUNDS[i % 16], 64, rng) for i in range(64)]
    return np.stack([scene.image for scene in scenes])


def test_the_analytic_encoder_computes_the_patch_basis(pictures):
    basis = autoencoder.PatchBasis.fit(pictures, 16)
    model = autoencoder.build(64, basis)
    target = autoencoder.to_tensor(pictures[:8])
    with torch.no_grad():
        posterior = model.encode(target).latent_dist
    expected = basis.encode(target)
    assert expected.std() == pytest.approx(1, abs=0.1)
    assert (posterior.mode() - expected).abs().max() < 2e-3
    assert posterior.std.max() < 0.01
    torch.testing.assert_close(autoencoder.PatchBasis.of(model).encode(target), expected, atol=1e-3, rtol=1e-3)


def test_a_decoder_learns_from_the_analytic_latents(pictures, tmp_path):
    torch.manual_seed(0)
    basis = autoencoder.PatchBasis.fit(pictures, 16)
    model = autoencoder.build(64, basis)
    before = autoencoder.signal_to_noise(model, basis, pictures[:8])
    budget = Budget(steps=12, minutes=5, lr=2e-3, ema=0.5)
    autoencoder.train_decoder(model, basis, pictures, budget, tmp_path, "cpu", 0)
    assert autoencoder.signal_to_noise(model, basis, pictures[:8]) > before + 1


@pytest.mark.parametrize("side", [2, 4, 8])
def test_small_maps_as_products_equal_convolution(side):
    torch.manual_seed(0)
    conv = nn.Conv2d(6, 10, 3, padding=1).bfloat16()
    x = torch.randn(3, 6, side, side, dtype=torch.bfloat16, requires_grad=True)
    plain = conv(x)
    plain.sum().backward()
    gradients = [x.grad.clone(), conv.weight.grad.clone()]
    x.grad = conv.weight.grad = None
    with small_maps_as_products(conv):
        ours = conv(x)
        ours.sum().backward()
    assert "forward" not in vars(conv)
    torch.testing.assert_close(ours, plain, atol=0.03, rtol=0.03)
    for found, expected in zip((x.grad, conv.weight.grad), gradients, strict=True):
        torch.testing.assert_close(found, expected, atol=0.1, rtol=0.03)


def test_the_text_encoder_is_the_scorers_text_tower(tmp_path):
    torch.manual_seed(0)
    model = clip.build(64, 32).eval()
    encoder = clip.text_encoder(model, 32)
    tokens = clip.tokenise(["a cat left of a red apple", "an owl"], 32)
    with torch.no_grad():
        hidden = model.token_embedding(tokens) + model.positional_embedding
        tower = model.ln_final(model.transformer(hidden, attn_mask=model.attn_mask))
        torch.testing.assert_close(encoder(tokens).last_hidden_state, tower, atol=1e-5, rtol=1e-5)
    clip.save(model, tmp_path / "clip", 64, 32)
    loaded, _, _ = open_clip.create_model_and_transforms(f"local-dir:{tmp_path / 'clip'}")
    with torch.no_grad():
        found, expected = loaded.encode_text(tokens), model.encode_text(tokens)
    torch.testing.assert_close(found, expected, atol=1e-2, rtol=1e-2)


def test_the_scheduler_never_clips_latents_and_ends_in_pure_noise():
    scheduler = diffusion.scheduler()
    assert not scheduler.config.clip_sample and scheduler.config.prediction_type == "v_prediction"
    assert float(scheduler.alphas_cumprod[-1]) == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("muon", [False, True])
def test_an_interrupted_stage_goes_on_where_it_was(tmp_path, muon):
    def run(folder, stops):
        torch.manual_seed(0)
        model = nn.Linear(4, 2)
        for steps in stops:
            stage = Stage("toy", model, Budget(steps=10, minutes=60, lr=0.1), folder, muon=muon)

            def loss(step, progress, stage=stage, steps=steps, model=model):
                if step == steps:
                    raise KeyboardInterrupt
                noise = torch.randn(8, 4, generator=torch.Generator().manual_seed(step))
                return model(noise).square().mean()

            try:
                stage.train(loss)
            except KeyboardInterrupt:
                stage.save()
                model = nn.Linear(4, 2)
        return stage.ema

    whole, parts = run(tmp_path / "a", [99]), run(tmp_path / "b", [4, 99])
    assert all(torch.equal(whole[key], parts[key]) for key in whole)


def test_what_is_frozen_has_no_average_but_what_it_is(tmp_path):
    first, second = nn.Linear(4, 4), nn.Linear(4, 2)
    model = nn.Sequential(first, second)
    budget = Budget(steps=4, minutes=60, lr=0.1, ema=0.99)
    Stage("toy", model, budget, tmp_path).train(lambda step, progress: model(torch.ones(1, 4)).square().mean())
    first.requires_grad_(False)
    longer = Stage("toy", model, Budget(steps=6, minutes=60, lr=0.1, ema=0.99), tmp_path, muon=True)
    longer.train(lambda step, progress: model(torch.ones(1, 4)).square().mean())  # another optimiser: fresh moments
    assert longer.step == 6 and torch.equal(longer.ema["0.weight"], first.weight)
    assert not torch.equal(longer.ema["1.weight"], second.weight)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_muon_turns_a_kernel_as_its_matrix_whatever_the_layout(layout):
    torch.manual_seed(0)
    weight, gradient = torch.randn(6, 5, 3, 3), torch.randn(6, 5, 3, 3)
    kernel = nn.Parameter(weight.clone(memory_format=layout))
    optimiser = MuonAdamW([{"params": [kernel], "weight_decay": 0.01, "lr": 0.1}], (0.9, 0.99))
    kernel.grad = gradient.contiguous(memory_format=torch.channels_last)
    optimiser.step()
    matrix = nn.Parameter(weight.flatten(1).clone())
    plain = torch.optim.Muon([matrix], lr=0.1 * MATRIX_RATE, weight_decay=0.01, adjust_lr_fn="match_rms_adamw")
    matrix.grad = gradient.flatten(1).clone()
    plain.step()
    # Newton and Schulz run in bf16, so another order of columns rounds otherwise.
    torch.testing.assert_close(kernel.flatten(1), matrix, atol=2e-3, rtol=0)
    optimiser.zero_grad()
    assert kernel.grad is None


class _Colours:
    """A scorer for speed: coarse colours tell the drawn things apart."""

    label, size = "coarse colours", 96

    def embed(self, images):
        return nn.functional.normalize(nn.functional.adaptive_avg_pool2d(images, 4).flatten(1), dim=-1)


def test_quality_lies_between_floor_and_ceiling(things):
    judge = Judge.build(things, _Colours(), 64)
    singles, pairs = protocol(list(things), pairs=10)
    assert len(singles) == 24 and all(len(case.names) == 2 for case in pairs)
    real = real_scenes(singles, things, 64)
    report = measure(judge, singles, real, real)
    assert report["share"] == pytest.approx(1) and report["floor"] < report["ceiling"]
    assert measure(judge, pairs, real_scenes(pairs, things, 64), real_scenes(pairs, things, 64))["cases"] == len(pairs)


def test_most_contrastive_batches_come_from_few_backgrounds():
    captions = [f"a cat {background_phrase(ground)}" for ground in BACKGROUNDS for _ in range(5)]
    grounds = clip._by_ground(captions)
    assert sorted(np.concatenate(list(grounds.values())).tolist()) == list(range(len(captions)))
    shown = [len({captions[i] for i in clip._alike(grounds, 60, np.random.default_rng(seed))}) for seed in range(60)]
    assert shown.count(1) > 15 and shown.count(2) > 5 and max(shown) > 10


@pytest.mark.parametrize(("units", "pays"), [({"amx_bf16"}, True), ({"avx512_bf16"}, True), ({"avx2"}, False)])
def test_bf16_is_for_processors_that_compute_in_it(units, pays, monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: dict.fromkeys(units, True), raising=False)
    bf16_pays.cache_clear()
    try:
        with autocast("cpu"):
            assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == (torch.bfloat16 if pays else torch.float32)
        assert bf16_pays("cuda:0")
    finally:
        bf16_pays.cache_clear()


def test_a_frozen_text_encoder_reads_each_caption_once():
    torch.manual_seed(0)
    unet = diffusion.build(64, 4, (16, 16))
    model = diffusion.Conditioned(unet, clip.text_encoder(clip.build(64, 16), 16), 16)
    remembered = diffusion._Remembered(model)
    hidden = remembered(["a cat", "an owl", "a cat"])
    with torch.no_grad():
        torch.testing.assert_close(hidden[1:], model.encode(["an owl", "a cat"]), atol=1e-2, rtol=1e-2)
    assert torch.equal(hidden[0], hidden[2]) and len(remembered._known) == 2
