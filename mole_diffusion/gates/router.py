"""RouterLoRA (arXiv 2406.16989): a router per module that any number of experts can stand before, in any order."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mole_diffusion.errors import BaseMismatch
from mole_diffusion.functional import router_logits, softmax_gate
from mole_diffusion.gates.block import pooled
from mole_diffusion.gates.config import RouterConfig
from mole_diffusion.gates.protocol import BlockSpec, Looks, Run, Sight, Total
from mole_diffusion.gates.span import nla_rows


class Router(nn.Module):
    """A_r and B_r of one module; B_r starts at zero, so that routing starts at NLA.

    Attributes:
        a: (r, d_in).
        b: (d_out, r).
    """

    def __init__(self, d_in: int, d_out: int, config: RouterConfig) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.empty(config.rank, d_in))
        self.b = nn.Parameter(torch.zeros(d_out, config.rank))
        self.log_tau = nn.Parameter(torch.tensor(math.log(config.temperature)))
        nn.init.kaiming_uniform_(self.a, a=math.sqrt(5))


class TrainedRouter(RouterConfig):
    """A router that has learned, as settings: any experts may be composed with it, ``compose(…, gate=router)``.

    Modules that it was not trained on start at NLA.

    Attributes:
        tensors: those of :class:`RouterGates`, by name.
    """

    def __init__(self, config: RouterConfig, tensors: Mapping[str, Tensor]) -> None:
        super().__init__(**asdict(config))
        object.__setattr__(self, "tensors", dict(tensors))  # no field: settings in files stay settings

    tensors: dict[str, Tensor]


class RouterGates(nn.Module):
    """Routers of all modules; see :class:`mole_diffusion.gates.RouterConfig`.

    Its tensors say nothing of the experts: a trained router fits any set on the same modules.
    """

    looks: Looks = "site"
    needs_spans = False
    total: Total = "share"

    def __init__(self, sizes: Mapping[str, tuple[int, int]], config: RouterConfig) -> None:
        """``sizes``: module path → (input channels, output channels).

        Raises:
            BaseMismatch: a trained router learned on modules of other sizes, or on none of these.
        """
        super().__init__()
        self.config = config
        self.guidance_rows = config.guidance_rows
        self.pools = config.scope == "sample"
        self.routers = nn.ModuleDict(
            {path.replace(".", "/"): Router(d_in, d_out, config) for path, (d_in, d_out) in sizes.items()}
        )
        if isinstance(config, TrainedRouter):
            self._take(config.tensors)

    def image(self, block: BlockSpec, sight: Sight | None, run: Run) -> Tensor | None:
        """(B, L or 1, N): per place, as in the paper."""
        return None if sight is None else self._route(block, sight, run)

    def text(self, block: BlockSpec, sight: Sight, run: Run) -> Tensor | None:
        """(B, T, N): modules that read text are routed by it; None in the sample scope."""
        return None if self.pools else self._route(block, sight, run)

    def network(self, block: BlockSpec, run: Run) -> Tensor:
        """NLA: without an input there is nothing to route by."""
        return nla_rows(run)

    def encoder(self, block: BlockSpec, run: Run) -> Tensor:
        """NLA."""
        return nla_rows(run)

    def gain(self, block: BlockSpec, text: bool) -> Tensor | None:
        """None."""
        return None

    def static(self, block: BlockSpec, mask: Tensor) -> Tensor | None:
        """A router looks at its input."""
        return None

    def borrow(self, other: RouterGates) -> None:
        """Route with the routers of ``other``, module for module: what they learn here they have learned there."""
        for path in self.routers:
            self.routers[path] = other.routers[path]

    @torch.no_grad()
    def _take(self, trained: Mapping[str, Tensor]) -> None:
        for name, parameter in self.named_parameters():
            value = trained.get(name)
            if value is None:
                continue
            if value.shape != parameter.shape:
                raise BaseMismatch(
                    f"The router learned on another base: at {name} it has the shape {tuple(value.shape)}, here it "
                    f"needs {tuple(parameter.shape)}."
                )
            parameter.copy_(value)
        if not trained.keys() & dict(self.named_parameters()).keys():
            raise BaseMismatch("The router learned on another base: it knows none of the modules of these experts.")

    def _route(self, block: BlockSpec, sight: Sight, run: Run) -> Tensor:
        router, down, bank = self.routers[block.name.replace(".", "/")], sight.down, sight.bank
        assert isinstance(router, Router) and down is not None and bank is not None
        with torch.autocast(down.device.type, enabled=False):
            query = F.linear(sight.hidden.float(), router.a)
            keys = router.b.mT @ bank.b.float()
            columns = max(run.experts, bank.columns[-1] + 1)
            logits = router_logits(query, down, keys, bank.owners, columns)[..., : run.experts]
        if self.config.scope == "sample":
            logits = pooled(logits, sight.places)
        here = torch.zeros(columns, dtype=torch.bool, device=down.device).index_copy(0, bank.chosen, bank.present)
        return softmax_gate(logits, router.log_tau.exp(), run.mask & here[: run.experts])
