"""Who is asking on a Space: a signed-in user, a browser that was here before, or a single page."""

from __future__ import annotations

import re
import time
import uuid
from collections.abc import Mapping
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from starlette.datastructures import MutableHeaders
from starlette.requests import HTTPConnection

if TYPE_CHECKING:
    import gradio as gr
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

__all__ = ["COOKIE", "VisitCookie", "can_sign_in", "visitor"]

COOKIE = "__Host-mole-visit"
LIFETIME = 400 * 24 * 3600
"""Seconds, counted from the last visit: the longest that browsers keep a cookie."""
_ID = re.compile(r"[0-9a-f]{32}")


def visitor(request: gr.Request | None) -> str:
    """Who is asking, by the strongest sign there is; the kind in front keeps one sign from passing for another.

    ``user:<id>`` of the Hugging Face login, else ``visit:<id>`` of this browser's cookie, else ``page:<id>`` of this
    page load alone. A name typed at the password prompt proves nothing and does not count.
    """
    connection = getattr(request, "request", None)
    if user := _signed_in(getattr(connection, "scope", {}).get("session")):
        return f"user:{user}"
    if visit := _visit(getattr(connection, "cookies", {})):
        return f"visit:{visit}"
    return f"page:{getattr(request, 'session_hash', None) or uuid.uuid4().hex}"


def can_sign_in() -> bool:
    """Whether the Hugging Face login works here: this Space offers it, and the packages for it are installed."""
    from gradio import oauth, utils

    offered = (oauth.OAUTH_CLIENT_ID, oauth.OAUTH_CLIENT_SECRET, oauth.OAUTH_SCOPES, oauth.OPENID_PROVIDER_URL)
    return bool(utils.get_space()) and all(offered) and all(find_spec(name) for name in ("authlib", "itsdangerous"))


class VisitCookie:
    """ASGI middleware: gives every browser that opens the page an unguessable id, and renews it at each visit.

    Scripts cannot read it. A Space is shown inside a frame of huggingface.co, so the cookie may be a third party's.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Add the cookie to the answer that is the page itself; everything else passes unchanged."""
        if scope["type"] != "http" or scope["path"] != "/":
            await self._app(scope, receive, send)
            return
        visit = _visit(HTTPConnection(scope).cookies) or uuid.uuid4().hex

        async def send_with_cookie(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).append("set-cookie", _set_cookie(visit))
            await send(message)

        await self._app(scope, receive, send_with_cookie)


def _set_cookie(visit: str) -> str:
    return f"{COOKIE}={visit}; Max-Age={LIFETIME}; Path=/; Secure; HttpOnly; SameSite=None; Partitioned"


def _visit(cookies: Mapping[str, str]) -> str | None:
    visit = cookies.get(COOKIE, "")
    return visit if _ID.fullmatch(visit) else None


def _signed_in(session: Mapping[str, Any] | None) -> str | None:
    """The account's id, which stays the same when its owner takes another name; None once the login has expired."""
    login = (session or {}).get("oauth_info") or {}
    expires = login.get("expires_at")
    if expires is not None and expires < time.time():
        return None
    return (login.get("userinfo") or {}).get("sub")
