"""Experts on language models of transformers, causal and encoder-decoder.

``compose(model, experts, gate=…)`` works as on a pipeline; experts come from PEFT checkpoints (``Expert.load(folder)``)
or out of a model that holds them (:func:`from_peft`); :func:`train_gates` trains gates with the model's own loss.
"""

from __future__ import annotations

from mole_diffusion.text.host import TextHost
from mole_diffusion.text.peft_model import from_peft
from mole_diffusion.text.training import train_gates

__all__ = ["TextHost", "from_peft", "train_gates"]
