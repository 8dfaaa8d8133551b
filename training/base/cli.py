"""``python -m training base``: the demo world from registry packages to ordinary model folders, stage by stage.

Every stage resumes; a stage that has used its budget is not run again. The same command trains a larger base:
``--size 128 --device cuda --minutes-diffusion 40``.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL
from safetensors.torch import load_file, save_file

from mole_diffusion.bases.names import assets_dir
from mole_diffusion.errors import InvalidRequest
from mole_diffusion.scoring.identity import EfficientNetIdentity
from training.base import autoencoder, clip, diffusion, judge, quality, subjects
from training.base.autoencoder import PatchBasis
from training.base.corpus import Cutout, load_extra, load_things
from training.base.scene_pool import ScenePool, write_shard
from training.base.scenes import WORLD
from training.base.stage import Budget

logger = logging.getLogger(__name__)
CONTEXT = 32
STAGES = ("subjects", "scenes", "decoder", "clip", "diffusion", "export", "judge")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    parser.add_argument("--work", type=Path, default=Path("runs/base"), help="checkpoints, scenes, sheets (resumable)")
    parser.add_argument("--cache", type=Path, default=Path(".cache/corpus"), help="registry packages")
    parser.add_argument("--out", type=Path, default=None, help="asset folder to write (default: the product's own)")
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=list(STAGES))
    parser.add_argument("--size", type=int, default=64, help="pixels; a multiple of 32")
    parser.add_argument("--channels", type=int, default=16, help="latent channels")
    parser.add_argument("--widths", type=int, nargs="+", default=[80, 144, 192], help="UNet channels, multiples of 16")
    parser.add_argument("--scenes", type=int, default=40000, help="scenes drawn for the pool")
    parser.add_argument("--minutes-decoder", type=float, default=30)
    parser.add_argument("--minutes-clip", type=float, default=15)
    parser.add_argument("--minutes-diffusion", type=float, default=60)
    parser.add_argument("--batch", type=int, default=96, help="scenes per step of the denoiser")
    parser.add_argument(
        "--warm-start",
        type=Path,
        default=None,
        metavar="FOLDER",
        help="begin with the weights of this demo folder (base/ and clip/) instead of fresh ones",
    )
    parser.add_argument("--freeze-text", action="store_true", help="train the denoiser alone")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--seed", type=int, default=0)


@dataclass
class _World:
    """What the stages share."""

    args: argparse.Namespace
    out: Path
    _things: dict[str, Cutout] | None = None

    @property
    def things(self) -> dict[str, np.ndarray]:
        if self._things is None:
            self._things = load_things(self.args.cache, 2 * self.args.size)
        return {name: thing.rgba for name, thing in self._things.items()}

    @property
    def work(self) -> Path:
        return self.args.work

    @property
    def scenes(self) -> Path:
        return self.work / f"scenes-{WORLD}"

    def pool(self) -> ScenePool:
        pool = ScenePool(self.scenes)
        pool.refresh()
        if not pool.captions:
            raise InvalidRequest("There are no scenes yet: run the stage 'scenes' first.")
        return pool

    def basis(self) -> PatchBasis:
        path = self.work / "basis.safetensors"
        if not path.exists() and self.args.warm_start:
            # Other latents than the shipped encoder's would make the shipped weights worthless.
            shipped: Any = AutoencoderKL.from_pretrained(self.args.warm_start / "base" / "vae")
            basis = PatchBasis.of(shipped)
            save_file({"mean": basis.mean, "projection": basis.projection.contiguous()}, path)
        elif not path.exists():
            basis = PatchBasis.fit(self.textures()[:4000], self.args.channels)
            save_file({"mean": basis.mean, "projection": basis.projection.contiguous()}, path)
        return PatchBasis(**load_file(path))

    def textures(self) -> np.ndarray:
        path = self.work / "textures.npy"
        if not path.exists():
            assert self.things and self._things is not None
            extra = load_extra(self.args.cache, 2 * self.args.size)
            np.save(path, autoencoder.picture_pool(self._things, extra, 16000, self.args.size, self.args.seed))
        return np.load(path, mmap_mode="r")

    def vae(self) -> AutoencoderKL:
        """The autoencoder with the decoder's averaged weights where they exist."""
        model = autoencoder.build(self.args.size, self.basis())
        found = _average(self.work / "decoder")
        if found is not None:
            model.decoder.load_state_dict(load_file(found))
        elif self.args.warm_start:
            shipped = AutoencoderKL.from_pretrained(self.args.warm_start / "base" / "vae")
            model.decoder.load_state_dict(shipped.decoder.state_dict())  # type: ignore[union-attr]
        return model


def main(args: argparse.Namespace) -> int:
    """Run the chosen stages in their order."""
    if args.size % 32:
        raise InvalidRequest(f"--size must be a multiple of 32, not {args.size}.")
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    args.work.mkdir(parents=True, exist_ok=True)
    world = _World(args, args.out or assets_dir() / "demo")
    for stage in STAGES:
        if stage in args.stages:
            logger.info("stage %s", stage)
            _RUN[stage](world)
    return 0


def _subjects(world: _World) -> None:
    subjects.write_subjects(world.out / "subjects", world.args.cache)


def _scenes(world: _World) -> None:
    from training.base.scene_pool import SHARD

    for index in range(-(-world.args.scenes // SHARD)):
        write_shard(world.scenes, index, world.things, world.args.size)


def _decoder(world: _World) -> None:
    budget = Budget(steps=10**6, minutes=world.args.minutes_decoder, lr=2e-3, ema=0.998)
    pool, vae, basis = world.textures(), world.vae(), world.basis()
    autoencoder.train_decoder(vae, basis, pool[:-64], budget, world.work, world.args.device, world.args.seed)
    logger.info("decoder: %.2f dB on pictures it never saw", autoencoder.signal_to_noise(vae.cpu(), basis, pool[-64:]))


def _clip(world: _World) -> None:
    model = clip.build(world.args.size, CONTEXT)
    if world.args.warm_start:
        model.load_state_dict(load_file(world.args.warm_start / "clip" / "open_clip_model.safetensors"))
    budget = Budget(steps=10**6, minutes=world.args.minutes_clip, lr=1e-3, ema=0.99)
    clip.train(model, world.pool(), CONTEXT, budget, world.work, world.args.device, world.args.seed)


def _parts(world: _World):
    scorer = clip.build(world.args.size, CONTEXT)
    found = _average(world.work / "clip")
    if found is not None:
        scorer.load_state_dict(load_file(found))
    unet = diffusion.build(world.args.size, world.args.channels, tuple(world.args.widths))
    encoder = clip.text_encoder(scorer, CONTEXT)
    if world.args.warm_start:  # both or none: a denoiser reads the text encoder that it was trained with
        folder = world.args.warm_start / "base"
        if found is None:
            scorer.load_state_dict(load_file(world.args.warm_start / "clip" / "open_clip_model.safetensors"))
        unet.load_state_dict(load_file(folder / "unet" / "diffusion_pytorch_model.safetensors"))
        encoder.load_state_dict(load_file(folder / "text_encoder" / "model.safetensors"), strict=False)
    return unet, encoder, scorer


def _diffusion(world: _World) -> None:
    unet, encoder, _ = _parts(world)
    budget = Budget(steps=10**6, minutes=world.args.minutes_diffusion, lr=1e-3, ema=0.998)
    diffusion.train(unet, world.vae(), encoder, world.basis(), world.pool(), budget, world.work, world.args.device,
                    world.args.seed, CONTEXT, world.args.batch, not world.args.freeze_text)  # fmt: skip


def _trained(world: _World):
    unet, encoder, scorer = _parts(world)
    found = _average(world.work / "diffusion")
    if found is not None:
        diffusion.Conditioned(unet, encoder, CONTEXT).load_state_dict(load_file(found))
    elif not world.args.warm_start:
        raise InvalidRequest(
            "There is no trained denoiser yet: run the stage 'diffusion' first, or name a folder with --warm-start."
        )
    return diffusion.pipeline(unet.eval(), world.vae().eval(), encoder.eval(), CONTEXT), scorer


def _export(world: _World) -> None:
    pipe, scorer = _trained(world)
    pipe.to(dtype=torch.float16)
    pipe.save_pretrained(world.out / "base", safe_serialization=True)
    clip.save(scorer, world.out / "clip", world.args.size, CONTEXT)


def _judge(world: _World) -> None:
    pipe, _ = _trained(world)
    referee = judge.Judge.build(world.things, EfficientNetIdentity(size=96), world.args.size)
    report: dict[str, dict[str, float]] = {}
    singles, pairs = quality.protocol(list(world.things))
    for title, cases in (("singles", singles), ("unseen pairs", pairs)):
        pictures = diffusion.draw(pipe, [case.prompt for case in cases], list(range(len(cases))))
        report[title] = quality.measure(
            referee, cases, pictures, quality.real_scenes(cases, world.things, world.args.size)
        )
        logger.info("%s: %s", title, json.dumps(report[title]))
    (world.out / "base").mkdir(parents=True, exist_ok=True)
    (world.out / "base" / "quality.json").write_text(json.dumps(report, indent=2) + "\n")
    both = zip(singles, pairs, strict=False)
    prompts = tuple(case.prompt for pair in both for case in pair)[:32]
    diffusion.contact_sheet(pipe, prompts, world.out / "base" / "sheet.png", 8)
    (world.out / "base" / "sheet.txt").write_text("\n".join(prompts) + "\n")


def _average(folder: Path) -> Path | None:
    path = folder / "checkpoint" / "ema.safetensors"
    return path if path.exists() else None


_RUN: dict[str, Callable[[_World], None]] = {
    "subjects": _subjects, "scenes": _scenes, "decoder": _decoder, "clip": _clip, "diffusion": _diffusion,
    "export": _export, "judge": _judge,
}  # fmt: skip
