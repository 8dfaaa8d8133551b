"""What a model answers so that experts can be put into it, whatever library it comes from."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from torch import Tensor, device, nn

from mole_diffusion.experts.canonical import Expert
from mole_diffusion.gates.protocol import BlockSpec, Sees


@dataclass(frozen=True)
class Step:
    """One forward pass of the main model, as it begins.

    Attributes:
        rows: of the batch, unconditional ones included.
        device: where it runs.
        times: (rows,) timesteps in 0 … ``horizon``, or None.
        horizon: number of training timesteps.
        text: (rows, T, c) text states, or None.
        latent: height and width of the latents; (1, 1) where there is no image.
        places: (rows, L) non-negative, the model's own tokens that pooling counts; None = all alike.
        text_places: (rows, T) the same for ``text``.
        memory: (rows, T, d) what gates of the scope sample look at in place of a block's own tokens, such as the states
            of the encoder that a decoder answers to; ``text_places`` are its too. None = the block's own tokens.
        after: "nothing" = a pass of its own; "part" = the next part of the running pass, such as a decoder after its
            encoder; "prompt" = a later pass of one answer, in which gates of the scope sample keep the weights that
            they gave to the prompt. Without ``text`` nobody knows the prompt.
        spans: (rows, T, N) bool, where triggers stand in ``text``; None = as announced with the prompts.
    """

    rows: int
    device: device
    times: Tensor | None = None
    horizon: int = 1000
    text: Tensor | None = None
    latent: tuple[int, int] = (1, 1)
    places: Tensor | None = None
    text_places: Tensor | None = None
    memory: Tensor | None = None
    after: Literal["nothing", "part", "prompt"] = "nothing"
    spans: Tensor | None = None


class Listener(Protocol):
    """Who is told what the models do."""

    def begin(self, step: Step) -> None:
        """The main model starts."""
        ...

    def end(self) -> None:
        """The main model has finished."""
        ...

    def encode(self, component: str, spans: Tensor | None, places: device) -> None:
        """A text encoder starts on ids with these trigger spans (B, T, N), on this device."""
        ...

    def hear(self, prompts: Sequence[str] | None, guidance: bool) -> None:
        """The next batches come from these prompts; None = ready-made embeddings."""
        ...


class Host(Protocol):
    """A pipeline or model that experts are composed on.

    Attributes:
        main: the component whose forward pass is one step; its modules are gated, those of the others count as text
            encoders.
        network_width: channels of ``Step.text``; 0 = no text is given.
    """

    main: str
    network_width: int

    def models(self) -> Mapping[str, nn.Module]:
        """Component → model, the main one first."""
        ...

    def blocks(self) -> Sequence[BlockSpec]:
        """The main model's blocks in their order, at block granularity."""
        ...

    def layer(self, block: BlockSpec, leaf: str) -> str:
        """The layer of ``block`` that its module ``leaf`` belongs to, as a path inside the block; "" = the block."""
        ...

    def sees(self, block: BlockSpec, leaf: str) -> Sees:
        """What the module ``leaf`` of ``block`` reads."""
        ...

    def check(self) -> None:
        """Refuse a state in which replaced modules would be passed by.

        Raises:
            InvalidRequest: says which, and what to do.
        """
        ...

    def spans(self, prompts: Sequence[str], experts: Sequence[Expert]) -> Tensor:
        """(P, T, N) bool: where each expert's trigger stands, tokenised as the model tokenises."""
        ...

    def lend(self, experts: Sequence[Expert]) -> Callable[[], None]:
        """Teach the model the tokens that experts bring; the returned function makes it forget them.

        Raises:
            InvalidRequest: there is no tokenizer, or a token cannot be taught.
        """
        ...

    def watch(self, listener: Listener, experts: Sequence[Expert]) -> Callable[[], None]:
        """Tell ``listener`` what the models do until the returned function is called.

        ``experts`` may hold others later: their triggers are looked up when a prompt comes.
        """
        ...
