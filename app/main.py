"""The page: tabs over services. A Hugging Face Space runs this file as a script."""

from __future__ import annotations

import os
import sys
from pathlib import Path

ROOT = str(Path(__file__).resolve().parents[1])
if ROOT not in sys.path:
    sys.path.insert(0, ROOT)
os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")

import app.gpu  # noqa: E402, F401, I001  (before torch and gradio: ZeroGPU asks for it)
from typing import Any  # noqa: E402

import gradio as gr  # noqa: E402
from starlette.middleware import Middleware  # noqa: E402

from app.api import add_api  # noqa: E402
from app.services import Services, build_services  # noqa: E402
from app.settings import Settings, settings_from  # noqa: E402
from app.ui.generate import generate_tab  # noqa: E402
from app.ui.library import library_tab  # noqa: E402
from app.ui.parts import masthead  # noqa: E402
from app.ui.theme import css, head, start_script, theme  # noqa: E402
from app.ui.train import train_tab  # noqa: E402
from app.visits import VisitCookie, can_sign_in  # noqa: E402

__all__ = ["build_app", "launch_options", "main"]

QUIET: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}
DAY = 24 * 3600


def build_app(services: Services) -> gr.Blocks:
    """The page as a function of its services; nothing is loaded or started here."""
    with gr.Blocks(title="MoLE Diffusion", analytics_enabled=False, delete_cache=(3600, DAY)) as page:
        _masthead(login=services.settings.space and can_sign_in())
        with gr.Tabs(elem_id="tabs") as tabs:
            with gr.Tab("Generate", id="generate") as making:
                generate = generate_tab(services, page)
            with gr.Tab("Library", id="library") as shelves:
                library = library_tab(services, page)
            with gr.Tab("Train", id="train") as training:
                train = train_tab(services, page)
        making.select(generate.refresh, generate.offering, generate.offered, **QUIET)
        shelves.select(library.refresh, library.chosen, library.cards, **QUIET)
        training.select(train.refresh, train.offering, train.offered, **QUIET)
        library.onward.click(train.refresh, train.offering, train.offered, **QUIET).then(
            lambda: gr.Tabs(selected="train"), None, tabs, **QUIET
        )
        handed = gr.State(("", [], ""))
        train.use.click(train.picked, train.chosen, handed, **QUIET).then(
            generate.pick, handed, generate.picked, **QUIET
        ).then(lambda: gr.Tabs(selected="generate"), None, tabs, **QUIET)
        add_api(services)
    return page


def _masthead(login: bool) -> None:
    if not login:
        gr.HTML(masthead())
        return
    with gr.Row(elem_classes="signing"):
        gr.HTML(masthead())
        gr.LoginButton(
            "Sign in", "Sign out ({})", variant="secondary", size="sm", scale=0, min_width=110, elem_id="sign-in"
        )


def launch_options(settings: Settings) -> dict[str, Any]:
    """What ``launch`` is told: theme and style, and everything switched off that the page does not need."""
    options: dict[str, Any] = {
        "server_name": settings.host,
        "server_port": settings.port or None,
        "theme": theme(),
        "css": css(),
        "js": start_script(),
        "head": head(),
        "footer_links": ["api"],
        "ssr_mode": False,
        "enable_monitoring": False,
        "share": False,
        "show_error": False,
        "quiet": True,
        "max_file_size": "2gb",
        "allowed_paths": [],
        "blocked_paths": [str(settings.data_dir.resolve())],
    }
    if settings.space:
        options["app_kwargs"] = {"middleware": [Middleware(VisitCookie)]}
    if settings.password:
        password = settings.password
        options["auth"] = lambda _name, word: _same(word, password)
        options["auth_message"] = "Any name; the password is the one this page was started with."
    return options


def _same(word: str, password: str) -> bool:
    import hmac

    return hmac.compare_digest(word.encode(), password.encode())


def main() -> None:
    """Serve as a Space: settings come from the environment alone."""
    settings = settings_from()
    services = build_services(settings)
    page = build_app(services)
    page.queue(default_concurrency_limit=4)
    page.launch(**launch_options(settings), prevent_thread_lock=True)
    services.start()
    page.block_thread()


if __name__ == "__main__":
    main()
