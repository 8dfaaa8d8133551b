"""What the page is started with: one frozen record, filled from the command line and the environment."""

from __future__ import annotations

import argparse
import ipaddress
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import platformdirs

from mole_diffusion.errors import InvalidRequest
from training.jobs.limits import NO_LIMITS, Limits
from training.jobs.retention import KEEP_ALL, Retention

__all__ = ["APP_NAME", "Settings", "parser", "settings_from"]

APP_NAME = "mole-diffusion"
JOBS_ON_A_SPACE = 3
BASE_CHOICES = ("demo", "sd21", "sd21-base", "sdxl")


@dataclass(frozen=True)
class Settings:
    """Everything that may differ between two installations of the page.

    Attributes:
        data_dir: folder for experts, subjects, compositions, jobs and pictures; created on first use.
        host: address the server listens on; anything but loopback is open to other machines.
        port: TCP port, 0 picks a free one.
        password: asked for in the browser when set.
        base: name of the base that is selected first.
        base_folder: a local pipeline folder offered as a further base; never taken from a visitor.
        device: torch device, "auto" picks an accelerator when there is one.
        database: URL of a server database for jobs, where several machines work; None = a file in the data folder.
        limits: how many jobs and bytes one visitor may have.
        retention: how long the files of ended jobs stay.
        space: whether the page runs on a Hugging Face Space.
        zero_gpu: whether that Space lends its GPU per call (then nothing can train in the background).
        warm_up: load the selected base and its scorer once the server is up.
    """

    data_dir: Path
    host: str = "127.0.0.1"
    port: int = 7860
    password: str | None = None
    base: str = "demo"
    base_folder: Path | None = None
    device: str = "auto"
    database: str | None = field(default=None, repr=False)
    limits: Limits = NO_LIMITS
    retention: Retention = KEEP_ALL
    space: bool = False
    zero_gpu: bool = False
    warm_up: bool = True

    @property
    def is_open(self) -> bool:
        """Whether somebody on another machine can use the page without a password."""
        return not is_loopback(self.host) and self.password is None and not self.space

    @property
    def base_names(self) -> tuple[str, ...]:
        """The allow-list of bases: the known ones and the owner's local folder."""
        return BASE_CHOICES + ((str(self.base_folder),) if self.base_folder else ())

    @property
    def training_blocked(self) -> str | None:
        """Why gates cannot be trained here, as a sentence, or None where they can."""
        if self.zero_gpu:
            return (
                "Training is off on this Space: ZeroGPU lends its GPU for a minute at a time, and gates need longer. "
                "Duplicate the Space with its own GPU, or run the page on your machine."
            )
        return None


def is_loopback(host: str) -> bool:
    """Whether ``host`` can be reached from this machine alone."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def parser() -> argparse.ArgumentParser:
    """The options of ``python -m app``."""
    cli = argparse.ArgumentParser(prog="python -m app", description="Start the page of MoLE Diffusion.")
    cli.add_argument("--host", help="address to listen on (default 127.0.0.1: this machine only)")
    cli.add_argument("--port", type=int, help="port to listen on (default 7860)")
    cli.add_argument("--data-dir", type=Path, help="folder for experts, jobs and pictures (default: per user)")
    cli.add_argument("--base", help=f"base selected first: {', '.join(BASE_CHOICES)} (default demo)")
    cli.add_argument("--base-folder", type=Path, help="a local pipeline folder to offer as a further base")
    cli.add_argument("--password", help="ask for this password in the browser; any user name is accepted")
    cli.add_argument("--device", help="cpu, cuda, mps or auto (default auto)")
    return cli


def settings_from(argv: Sequence[str] | None = None, environ: Mapping[str, str] | None = None) -> Settings:
    """Settings from the command line, then ``MOLE_*`` variables, then defaults.

    Raises InvalidRequest when a base is unknown, a port is not one, or a folder is not a pipeline.
    """
    env = os.environ if environ is None else environ
    args = parser().parse_args([] if argv is None else list(argv))
    space = bool(env.get("SPACE_ID"))
    settings = Settings(
        data_dir=_data_dir(args.data_dir or env.get("MOLE_DATA_DIR") or platformdirs.user_data_dir(APP_NAME)),
        host=args.host or env.get("MOLE_HOST") or ("0.0.0.0" if space else "127.0.0.1"),
        port=_port(args.port if args.port is not None else env.get("MOLE_PORT", "7860")),
        password=args.password or env.get("MOLE_PASSWORD") or None,
        base=args.base or env.get("MOLE_BASE") or "demo",
        base_folder=_folder(args.base_folder or env.get("MOLE_BASE_FOLDER")),
        device=args.device or env.get("MOLE_DEVICE") or "auto",
        database=env.get("MOLE_DATABASE_URL") or None,
        limits=_limits(env, space),
        retention=Retention.of(env),
        space=space,
        zero_gpu=_is_true(env.get("SPACES_ZERO_GPU")),
        warm_up=not _is_true(env.get("MOLE_NO_WARM_UP")),
    )
    if settings.base not in settings.base_names:
        raise InvalidRequest(
            f"The base must be one of {', '.join(settings.base_names)}, but it was {settings.base!r}; "
            "a pipeline folder of your own goes into --base-folder."
        )
    return settings


def _limits(env: Mapping[str, str], space: bool) -> Limits:
    """Those of the environment; on a Space, where everybody shares one GPU, few jobs each."""
    limits = Limits.of(env)
    return replace(limits, jobs_per_owner=JOBS_ON_A_SPACE) if space and limits.jobs_per_owner is None else limits


def _is_true(text: str | None) -> bool:
    return (text or "").strip().lower() in {"1", "true", "yes", "on"}


def _port(value: int | str) -> int:
    try:
        port = int(value)
    except ValueError as error:
        raise InvalidRequest(f"The port must be a number, but it was {value!r}.") from error
    if not 0 <= port <= 65535:
        raise InvalidRequest(f"The port must be between 0 and 65535, but it was {port}.")
    return port


def _data_dir(value: str | Path) -> Path:
    """Absolute: the database hands its paths to processes that may start in another folder."""
    return Path(value).expanduser().resolve()


def _folder(value: str | Path | None) -> Path | None:
    if not value:
        return None
    folder = Path(value).expanduser().resolve()
    if not (folder / "model_index.json").is_file():
        raise InvalidRequest(f"--base-folder must hold a model_index.json, but {folder} has none.")
    return folder
