from __future__ import annotations

from pathlib import Path

import torch

from mole_diffusion.bases import get_base
from mole_diffusion.preview import Previewer, apply_linear, fit_linear, to_image


def test_a_linear_decoder_is_recovered() -> None:
    latents, truth = torch.randn(1, 4, 12, 12), torch.randn(5, 3) * 0.05
    truth[4] = 0.5
    small = apply_linear(truth, latents)
    pictures = torch.nn.functional.interpolate(small, scale_factor=8, mode="nearest")
    torch.testing.assert_close(apply_linear(fit_linear(latents, pictures), latents), small, atol=1e-4, rtol=0)


def test_more_channels_than_places_still_give_a_preview() -> None:
    latents, pictures = torch.randn(1, 16, 2, 2), torch.rand(1, 3, 16, 16)
    assert torch.isfinite(apply_linear(fit_linear(latents, pictures), latents)).all()


def test_small_pictures_are_decoded_large_ones_after_the_first_are_not(demo_assets: Path) -> None:
    base = get_base("demo")
    previewer = Previewer(base, base.load())
    with torch.no_grad():
        assert previewer.quick(torch.randn(1, 8, 8, 8)).shape == (1, 3, 64, 64)
        large = torch.randn(1, 8, 40, 40)
        assert previewer.quick(large).shape == (1, 3, 320, 320), "the first one is exact, and fits the map"
        rough = previewer.quick(large)
    assert rough.shape == (1, 3, 160, 160) and float(rough.min()) >= 0 and float(rough.max()) <= 1


def test_pixels_keep_their_values() -> None:
    picture = torch.tensor([0.0, 0.5, 1.0]).view(3, 1, 1).expand(3, 2, 2)
    assert to_image(picture).getpixel((0, 0)) == (0, 128, 255)
