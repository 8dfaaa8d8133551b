"""What a file is, in words a newcomer understands."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mole_diffusion.errors import MoleError

if TYPE_CHECKING:
    from mole_diffusion.experts import Inspection

__all__ = ["FAMILIES", "alignment_name", "rank_words", "sentence"]

FAMILIES = {
    "demo": "the demo base",
    "sd1": "Stable Diffusion 1",
    "sd21": "Stable Diffusion 2.1",
    "sdxl": "Stable Diffusion XL",
}


def alignment_name(base: str) -> str:
    """ "alignment (demo CLIP)": no score is shown without the name of the model that made it."""
    from mole_diffusion.bases import get_base

    try:
        return f"alignment ({get_base(base).alignment_label})"
    except MoleError:
        return "alignment"


def rank_words(inspection: Inspection) -> str:
    """ "16" or "4 to 32"."""
    ranks = sorted(inspection.ranks)
    if not ranks:
        return "?"
    return str(ranks[0]) if len(ranks) == 1 else f"{ranks[0]} to {ranks[-1]}"


def sentence(inspection: Inspection, family: str) -> str:
    """One line about a file that was accepted, its reason about one that was refused."""
    if not inspection.ok:
        return inspection.reason
    layers = sum(inspection.targets.values())
    made_by = f", made by {inspection.producer}" if inspection.producer else ""
    trigger = f"trigger “{inspection.trigger}”" if inspection.trigger else "no trigger named"
    near = f" ({inspection.approximated} of them up to {inspection.error:.1%} off)" if inspection.error else ""
    return (
        f"A LoRA of rank {rank_words(inspection)} for {FAMILIES.get(family, family)}{made_by}, "
        f"{layers} {'layer' if layers == 1 else 'layers'}{near}, {trigger}."
    )
