"""Any module with linear or convolution layers inside, without knowing what it is: one gate for all of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from mole_diffusion.errors import InvalidRequest
from mole_diffusion.experts.canonical import Expert
from mole_diffusion.gates.protocol import BlockSpec, Sees
from mole_diffusion.hosts.protocol import Listener, Step

COMPONENT = "module"


class ModuleHost:
    """Experts name their targets "module.<path>"; see :class:`mole_diffusion.hosts.Host`.

    The module's first positional argument is its input, (B, L, d), (B, d) or (B, C, H, W); the whole module is one
    block, as wide as the input of the first layer that it names and the output of the last.
    """

    main = COMPONENT
    network_width = 0

    def __init__(self, module: nn.Module) -> None:
        self.module = module

    def models(self) -> Mapping[str, nn.Module]:
        """The module alone."""
        return {COMPONENT: self.module}

    def check(self) -> None:
        """See :meth:`Host.check`."""
        if isinstance(self.module, nn.Linear | nn.Conv2d):
            raise InvalidRequest(
                "A single Linear or Conv2d has no place inside it where experts could go: compose on the module that "
                "holds it."
            )

    def blocks(self) -> Sequence[BlockSpec]:
        """One, named ""."""
        shapes = [m.weight.shape for m in self.module.modules() if isinstance(m, nn.Linear | nn.Conv2d)]
        return [BlockSpec("", "layer", shapes[0][1], out_width=shapes[-1][0]) if shapes else BlockSpec("", "layer", 0)]

    def layer(self, block: BlockSpec, leaf: str) -> str:
        """It has no layers of its own."""
        return ""

    def sees(self, block: BlockSpec, leaf: str) -> Sees:
        """Its own tokens or cells."""
        return "image"

    def spans(self, prompts: Sequence[str], experts: Sequence[Expert]) -> Tensor:
        """A bare module has no prompts."""
        raise InvalidRequest("A bare module has no tokenizer, so triggers cannot be found: use another gate.")

    def lend(self, experts: Sequence[Expert]) -> Callable[[], None]:
        """A bare module has no tokens."""
        raise InvalidRequest("An expert brings tokens of its own, and a bare module has no tokenizer to teach them.")

    def watch(self, listener: Listener, experts: Sequence[Expert]) -> Callable[[], None]:
        """Forward hooks on the module."""

        def begin(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            x = args[0] if args else next(iter(kwargs.values()))
            latent = (x.shape[-2], x.shape[-1]) if x.ndim == 4 else (1, 1)
            listener.begin(Step(x.shape[0], x.device, latent=latent))

        before = self.module.register_forward_pre_hook(begin, with_kwargs=True, prepend=True)
        after = self.module.register_forward_hook(lambda *_: listener.end())

        def undo() -> None:
            before.remove()
            after.remove()

        return undo
