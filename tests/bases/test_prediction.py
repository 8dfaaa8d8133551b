from __future__ import annotations

import pytest
import torch
from diffusers import DDIMScheduler

from mole_diffusion.bases.prediction import PREDICTIONS, levels, prediction
from mole_diffusion.errors import InvalidRequest


def _scheduler(name: str, *, zero_snr: bool = False) -> DDIMScheduler:
    return DDIMScheduler(prediction_type=name, rescale_betas_zero_snr=zero_snr, clip_sample=False)


@pytest.mark.parametrize("name", PREDICTIONS)
def test_clean_inverts_target(name: str) -> None:
    scheduler, kind = _scheduler(name), prediction(name)
    x0, noise, t = torch.randn(3, 4, 5, 5), torch.randn(3, 4, 5, 5), torch.tensor([10, 500, 900])
    signal, spread = levels(scheduler, t, x0)
    noisy = scheduler.add_noise(x0, noise, t)
    torch.testing.assert_close(signal * x0 + spread * noise, noisy)
    torch.testing.assert_close(
        kind.clean(signal, spread, noisy, kind.target(signal, spread, x0, noise)), x0, atol=1e-3, rtol=0
    )


def test_v_target_equals_the_schedulers_velocity() -> None:
    scheduler = _scheduler("v_prediction", zero_snr=True)
    x0, noise, t = torch.randn(2, 4, 5, 5), torch.randn(2, 4, 5, 5), torch.tensor([0, 999])
    target = prediction("v_prediction").target(*levels(scheduler, t, x0), x0, noise)
    torch.testing.assert_close(target, scheduler.get_velocity(x0, noise, t))


@pytest.mark.parametrize("name", PREDICTIONS)
def test_clean_equals_the_schedulers(name: str) -> None:
    scheduler = _scheduler(name)
    scheduler.set_timesteps(10)
    latents, output, t = torch.randn(2, 4, 5, 5), torch.randn(2, 4, 5, 5), scheduler.timesteps[3]
    expected = scheduler.step(output, int(t), latents).pred_original_sample
    torch.testing.assert_close(prediction(name).clean(*levels(scheduler, t, latents), latents, output), expected)


def test_velocity_works_at_zero_terminal_snr() -> None:
    scheduler = _scheduler("v_prediction", zero_snr=True)
    noise, x0 = torch.randn(1, 4, 5, 5), torch.randn(1, 4, 5, 5)
    signal, spread = levels(scheduler, 999, x0)
    assert float(signal) == 0
    torch.testing.assert_close(prediction("v_prediction").clean(signal, spread, noise, -x0), x0)


def test_epsilon_at_zero_terminal_snr_is_refused() -> None:
    scheduler = _scheduler("epsilon", zero_snr=True)
    latents = torch.randn(1, 4, 5, 5)
    with pytest.raises(InvalidRequest, match="zero terminal SNR"):
        prediction("epsilon").clean(*levels(scheduler, 999, latents), latents, latents)


def test_other_predictions_are_refused() -> None:
    with pytest.raises(InvalidRequest, match="'sample'"):
        prediction("sample")
