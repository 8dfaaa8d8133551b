"""The one protocol of all gates, and what they see of a run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Protocol

from torch import Tensor

if TYPE_CHECKING:
    from mole_diffusion.layers.bank import ExpertBank

NETWORK = "network"
BlockKind = Literal["transformer", "resnet", "layer", "matrix", "network", "encoder"]
Looks = Literal["nothing", "entry", "site", "outputs"]
Sees = Literal["image", "text", "row"]
Total = Literal["share", "odds", "free"]


@dataclass(frozen=True)
class BlockSpec:
    """One gated place: a block, a layer of one, a single matrix, or what lies outside all blocks.

    Attributes:
        name: module path inside the main model, "network", or the name of a text encoder.
        kind: what sort of place.
        width: channels of the hidden state at its input.
        text_width: channels of the text states, where modules that read text are targets; else 0.
        image: does any target see image tokens or the row as a whole?
        out_width: channels of its output; 0 = as ``width``.
        stride: side of the square of latents that one of its image tokens or cells stands for; 0 = unknown.
    """

    name: str
    kind: BlockKind
    width: int
    text_width: int = 0
    image: bool = True
    out_width: int = 0
    stride: int = 0


@dataclass(frozen=True)
class Run:
    """What one forward pass of the main model (or of a text encoder) offers to gates.

    Rows are those that gates compute: with guidance and reuse the conditional half only.

    Attributes:
        mask: bool over the gated experts, True = active: (N,), or (rows, 1, N) where rows have their own subsets.
        time: (rows, 64) features of the timestep, or None.
        text: (rows, T, c) text states, or None.
        spans: (rows, T, N) bool, where each expert's trigger stands; None = prompts unknown.
        places: (rows, L) non-negative, the main model's own tokens that pooling counts; None = all alike.
        step: calls of the main model since the prompts were announced, this one not counted.
        times: (rows,) timesteps in 0 … ``horizon``, or None.
        horizon: number of training timesteps.
        text_places: (rows, T) as ``places``, for ``text``.
        memory: (rows, T, d) what gates that pool look at in place of a block's own tokens, or None.
    """

    mask: Tensor
    time: Tensor | None = None
    text: Tensor | None = None
    spans: Tensor | None = None
    places: Tensor | None = None
    step: int = 0
    times: Tensor | None = None
    horizon: int = 1000
    text_places: Tensor | None = None
    memory: Tensor | None = None

    @property
    def progress(self) -> float:
        """0 at pure noise … 1 at the picture, of the last row; 0 where there are no timesteps.

        Reading it waits for the accelerator.
        """
        return 0.0 if self.times is None else 1.0 - float(self.times[-1]) / self.horizon

    def seen(self, x: Tensor, pools: bool, *, text: bool = False) -> tuple[Tensor, Tensor | None]:
        """What a gate looks at where ``x`` (rows, L, d) comes in, and which of its tokens count.

        A gate that pools looks at the memory, where there is one of this width; ``text``: x is text itself.
        """
        places = self.text_places if text else self.places
        if pools and not text and self.memory is not None and self.memory.shape[-1] == x.shape[-1]:
            x, places = self.memory, self.text_places
        return x, places if places is not None and x.ndim == 3 and places.shape[1] == x.shape[1] else None

    @property
    def experts(self) -> int:
        """N."""
        return self.mask.shape[-1]


@dataclass(frozen=True)
class Sight:
    """What a gate may look at in one place.

    Attributes:
        hidden: (rows, L, d): the block's input; of a gate that looks at sites, the module's input.
        down: (rows, L', R): A·x of the site's experts, on the grid of A's output; only for gates that look at sites.
        bank: the site's experts.
        outputs: (rows, L, N·d): every expert's own output of the block; only for gates that look at outputs.
        key: the site's canonical key.
        places: (rows, L) non-negative, the tokens that pooling counts; None = all alike.
    """

    hidden: Tensor
    down: Tensor | None = None
    bank: ExpertBank | None = None
    outputs: Tensor | None = None
    key: str = ""
    places: Tensor | None = None


class Gate(Protocol):
    """Weights for every kind of target; (rows or 1, places or 1, N), fp32. Implementations are ``nn.Module``.

    Attributes:
        looks: what :meth:`image` looks at: "nothing"; the block's input at its "entry"; the input and A·x at the first
            "site" that runs in it; or the "outputs" that the block has with each expert alone (N passes).
        needs_spans: are the prompts needed?
        pools: is there one weight per row, from the mean over the places that count?
        guidance_rows: "reuse" or "own".
        total: how a prior on places acts: a "share" keeps the total weight, "odds" and "free" are each expert's own.
    """

    looks: Looks
    needs_spans: bool
    pools: bool
    guidance_rows: str
    total: Total

    def image(self, block: BlockSpec, sight: Sight | None, run: Run) -> Tensor | None:
        """For targets that see image tokens; ``sight`` is None where the gate looks at nothing.

        None = there is no gate here: NLA.
        """
        ...

    def text(self, block: BlockSpec, sight: Sight, run: Run) -> Tensor | None:
        """For targets that read text, (rows, T, N); None = as :meth:`image`."""
        ...

    def network(self, block: BlockSpec, run: Run) -> Tensor:
        """For targets outside any block."""
        ...

    def encoder(self, block: BlockSpec, run: Run) -> Tensor:
        """For targets inside a text encoder; ``run.spans`` are those of the ids that it is given."""
        ...

    def gain(self, block: BlockSpec, text: bool) -> Tensor | None:
        """A factor on all weights of the block's image or text gate."""
        ...

    def static(self, block: BlockSpec, mask: Tensor) -> Tensor | None:
        """(N,) weights of a block if they depend on no input and no step, else None; what merging needs."""
        ...
