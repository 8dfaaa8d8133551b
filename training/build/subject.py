"""``subject``: pictures to a task that trains an expert."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image

from training.build.base import device_asked_for, load_base
from training.data.captions import checked, read_captions, with_trigger, write_captions
from training.data.pictures import Checked, check_pictures, has_mask
from training.data.subjects import Subject
from training.errors import memory_named
from training.ranks import ALONE, Ranks

if TYPE_CHECKING:
    from training.tasks.subject import SubjectConfig, SubjectTask

Log = Callable[[str], None]
CAPTIONS = "captions.jsonl"


def build_subject(
    config: SubjectConfig,
    images: Path,
    work: Path | None = None,
    log: Log = lambda text: None,
    ranks: Ranks = ALONE,
) -> SubjectTask:
    """Read the pictures and their captions, load the base, attach the adapter.

    ``work`` keeps what need not be made twice: captions, as a file to edit, and pictures of the class. ``log`` hears
    what is odd about the pictures.
    """
    from training.tasks.subject import SubjectTask

    found = check_pictures(images)
    for warning in found.warnings:
        log(warning)
    captions = photo_captions(config, found, images, work, log)
    with memory_named(f"The base {config.base} does not fit into the memory of this device: choose a smaller one."):
        base, pipe = load_base(config.base, config.precision, config.checkpointing)
    for caption in filter(None, captions):
        lost = base.cut_off(pipe, caption)
        if lost:
            log(f"The text encoder does not read the end of a caption: “{lost}”. Shorten “{caption[:40]}…”.")
    subject = Subject(config.name or config.token, config.phrase, found.pictures, captions)
    return SubjectTask(config, base, pipe, subject, ranks, work)


def photo_captions(
    config: SubjectConfig, found: Checked, images: Path, work: Path | None, log: Log
) -> tuple[str | None, ...]:
    """A caption with the trigger for each picture, None for pictures without one; empty where there is none at all.

    Cut-outs have none: their backgrounds are drawn anew, and the caption says which.
    """
    if config.captions == "off":
        return ()
    photos = {name: picture for name, picture in zip(found.names, found.pictures, strict=True) if not has_mask(picture)}
    given = read_captions(images, found.names)
    unused = [name for name in given if name not in photos]
    if unused:
        log(f"Captions of cut-outs are not used, for their backgrounds are drawn anew: {', '.join(unused)}.")
    if config.captions == "auto":
        given |= _made({name: photos[name] for name in photos if name not in given}, work, log)
    named = {name: with_trigger(given[name], config.token, config.class_name) for name in photos if name in given}
    for name, caption in named.items():
        log(f"{name}: {caption}")
    if named and work is not None:
        write_captions(work / CAPTIONS, named)
    return tuple(named.get(name) for name in found.names) if named else ()


def _made(photos: dict[str, Image.Image], work: Path | None, log: Log) -> dict[str, str]:
    """Captions that were made for ``photos`` before, as their file holds them now, and new ones for the rest."""
    from mole_diffusion.bases import choose_placement

    kept = {} if work is None else read_captions(work, list(photos), CAPTIONS)
    missing = [name for name in photos if name not in kept]
    if not missing:
        return kept
    from training.data.captioner import load_captioner

    log(f"A model describes {len(missing)} pictures.")
    device = choose_placement(device_asked_for()).device
    texts = load_captioner(device=device)([photos[name] for name in missing])
    return {**kept, **{name: checked(text, name) for name, text in zip(missing, texts, strict=True)}}
