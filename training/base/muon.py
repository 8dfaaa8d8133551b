"""Muon for a model's matrices and kernels, AdamW for everything else, as one optimiser.

torch.optim.Muon takes matrices alone; a kernel (O, I, h, w) takes part as its matrix (O, I·h·w), on the same memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mole_diffusion.errors import InvalidRequest

MATRIX_RATE = 2.0
"""Muon's rate as a multiple of AdamW's; an update's root mean square is 0.2 of Muon's rate."""


class MuonAdamW:
    """An optimiser over groups as AdamW takes them: decayed parameters of two or more axes go to Muon.

    Args:
        groups: dicts of ``params``, ``weight_decay`` and ``lr``. Decay marks what is a map between features: biases,
            norms and embeddings have none.
        betas: AdamW's.
    """

    def __init__(self, groups: Sequence[dict[str, Any]], betas: tuple[float, float]) -> None:
        self.param_groups: list[dict[str, Any]] = []
        self._twins: list[tuple[nn.Parameter, nn.Parameter]] = []
        self._parts: list[torch.optim.Optimizer] = []
        for group in groups:
            settings = {"lr": group["lr"], "weight_decay": group["weight_decay"]}
            if group["weight_decay"]:
                twins = [(p, nn.Parameter(_matrix(p.data, p))) for p in group["params"]]
                self._twins += twins
                matrices = [matrix for _, matrix in twins]
                self._parts.append(torch.optim.Muon(matrices, adjust_lr_fn="match_rms_adamw", **settings))
            else:
                self._parts.append(torch.optim.AdamW(group["params"], betas=betas, fused=True, **settings))
            self.param_groups.append(dict(group))

    def step(self) -> None:
        """One update of all parameters at the groups' present rates."""
        for parameter, matrix in self._twins:
            matrix.data = _matrix(parameter.data, parameter)  # a moved model has new memory
            matrix.grad = None if parameter.grad is None else _matrix(parameter.grad, parameter)
        for group, part in zip(self.param_groups, self._parts, strict=True):
            factor = MATRIX_RATE if isinstance(part, torch.optim.Muon) else 1.0
            part.param_groups[0]["lr"] = group["lr"] * factor
            part.step()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget the gradients."""
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.grad = None
        for _, matrix in self._twins:
            matrix.grad = None

    def state_dict(self) -> dict[str, Any]:
        """The moments of all parts under running numbers, as an ordinary optimiser gives them."""
        state, start = {}, 0
        for part in self._parts:
            own = part.state_dict()
            state.update({start + index: value for index, value in own["state"].items()})
            start += len(own["param_groups"][0]["params"])
        return {"state": state, "param_groups": []}

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        """Take back what ``state_dict`` gave."""
        start = 0
        for part in self._parts:
            own = part.state_dict()
            count = len(own["param_groups"][0]["params"])
            moments = {i - start: value for i, value in saved["state"].items() if start <= i < start + count}
            part.load_state_dict({"state": moments, "param_groups": own["param_groups"]})
            start += count


def _matrix(tensor: Tensor, weight: Tensor) -> Tensor:
    """``weight`` or its gradient as (O, I·h·w), in the order that needs no copy of the weight."""
    if weight.ndim == 4 and weight.is_contiguous(memory_format=torch.channels_last):
        tensor = tensor.permute(0, 2, 3, 1)
    flat = tensor.reshape(tensor.shape[0], -1)
    if tensor.data_ptr() == weight.data_ptr() != flat.data_ptr():
        raise InvalidRequest(f"Muon needs weights that are contiguous or channels last, got strides {weight.stride()}.")
    return flat
