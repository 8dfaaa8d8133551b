"""Errors as sentences: what a user can act on is said, everything else is logged and apologised for."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from html import escape
from typing import Any

import gradio as gr

from app.sessions import SORRY
from mole_diffusion.errors import MoleError

__all__ = ["guarded"]

logger = logging.getLogger(__name__)


def guarded(handler: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap an event handler: a MoleError becomes a notice with its sentence, and the page stays as it is."""

    @functools.wraps(handler)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        try:
            return handler(*args, **kwargs)
        except MoleError as error:
            gr.Warning(escape(str(error)), title="", duration=10)
        except Exception:
            logger.exception("An event of the page failed.")
            gr.Warning(SORRY, title="", duration=10)
        return gr.skip()

    return wrapper
