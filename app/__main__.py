"""``python -m app``: start the page on this machine."""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from mole_diffusion.errors import MoleError

if TYPE_CHECKING:
    from app.settings import Settings


def main(argv: Sequence[str] | None = None) -> int:
    """Serve until interrupted. Returns 0, or 2 with one sentence when a setting cannot be honoured."""
    from app.settings import settings_from

    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    try:
        settings = settings_from(sys.argv[1:] if argv is None else argv)
    except MoleError as error:
        print(error, file=sys.stderr)
        return 2
    if settings.is_open:
        print(
            f"\n  ATTENTION: the page listens on {settings.host} without a password.\n"
            "  Everybody who can reach this machine can use it and see its library. Add --password to close it.\n",
            file=sys.stderr,
        )
    return _serve(settings)


def _serve(settings: Settings) -> int:
    from app.main import build_app, launch_options
    from app.services import build_services

    services = build_services(settings)
    page = build_app(services)
    page.queue(default_concurrency_limit=4)
    try:
        _app, url, _share = page.launch(**launch_options(settings), prevent_thread_lock=True)
    except OSError as error:
        print(f"The page could not start on {settings.host}:{settings.port}: {error}", file=sys.stderr)
        return 2
    services.start()
    print(f"MoLE Diffusion is ready: {url}\nYour data: {settings.data_dir}\nStop with Ctrl+C.", flush=True)
    try:
        page.block_thread()
    finally:
        services.stop()
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
