from __future__ import annotations

import pytest
import torch

from mole_diffusion.bases import choose_placement
from mole_diffusion.errors import InvalidRequest


def test_the_reason_is_given() -> None:
    placement = choose_placement("cpu")
    assert placement.device.type == "cpu" and placement.dtype == torch.float32
    assert placement.reason.startswith("cpu in float32: ")


def test_a_precision_that_was_asked_for_is_honoured() -> None:
    assert choose_placement("cpu", "bfloat16").dtype == torch.bfloat16


@pytest.mark.parametrize(("device", "precision"), [("toaster", None), ("cpu", "float8")])
def test_nonsense_is_refused(device: str, precision: str | None) -> None:
    with pytest.raises(InvalidRequest):
        choose_placement(device, precision)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_an_absent_device_is_refused() -> None:
    with pytest.raises(InvalidRequest, match="this machine has none"):
        choose_placement("cuda")
