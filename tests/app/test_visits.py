"""Who is asking on a Space: what is somebody's own stays theirs through a reload, and no sign passes for another."""

from __future__ import annotations

import time
import urllib.request
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import gradio as gr
import pytest
from gradio_client import Client
from starlette.requests import Request

from app.main import build_app, launch_options
from app.services import Services, build_services, owner_of
from app.settings import Settings
from app.visits import COOKIE
from tests.app.conftest import Files

VISIT = "0123456789abcdef" * 2


@pytest.fixture
def space(settings: Settings) -> Settings:
    return replace(settings, space=True)


def asking(cookie: str = "", session: Mapping[str, Any] | None = None, **more: str) -> gr.Request:
    headers = [(b"cookie", f"{COOKIE}={cookie}".encode())] if cookie else []
    scope: dict[str, Any] = {"type": "http", "headers": headers}
    return gr.Request(Request(scope if session is None else {**scope, "session": session}), **more)


def login(name: str, ends: float = 3600) -> dict[str, Any]:
    return {"oauth_info": {"expires_at": time.time() + ends, "userinfo": {"sub": name, "preferred_username": "ann"}}}


def test_the_login_counts_before_the_cookie_and_the_cookie_before_the_page(space: Settings) -> None:
    assert owner_of(space, asking(VISIT, login("42"), session_hash="abc")) == "user:42"
    assert owner_of(space, asking(VISIT, {}, session_hash="abc")) == f"visit:{VISIT}"
    assert owner_of(space, asking(VISIT, login("42", ends=-1))) == f"visit:{VISIT}", "the login has expired"
    assert owner_of(space, asking(session_hash="abc")) == "page:abc"


@pytest.mark.parametrize("cookie", ["user:42", "42", VISIT[:-1], VISIT.upper(), VISIT + "0"])
def test_nobody_can_invent_an_owner(space: Settings, cookie: str) -> None:
    assert owner_of(space, asking(cookie, session_hash="abc")) == "page:abc"
    assert owner_of(space, asking(username="42", session_hash="user:42")) == "page:user:42"


def test_without_any_sign_nothing_is_shared(space: Settings) -> None:
    assert owner_of(space, asking()) != owner_of(space, asking())
    assert owner_of(space, None) != owner_of(space, None)


def test_the_page_of_one_user_has_one_owner(settings: Settings) -> None:
    assert owner_of(settings, asking(VISIT, login("42"))) == owner_of(settings, None) == ""


@pytest.fixture
def served(space: Settings) -> Iterator[tuple[str, Services]]:
    services = build_services(space)
    page = build_app(services)
    _app, url, _share = page.launch(**launch_options(space), prevent_thread_lock=True)
    yield url, services
    page.close()


def test_a_browser_that_comes_back_finds_its_library(served: tuple[str, Services], files: Files) -> None:
    url, services = served
    visit = opened(url)
    services.library.add(files.robot, "mine.safetensors", owner=f"visit:{visit}")
    assert opened(url, visit) == visit
    assert "mine" in subjects(url, visit)
    other = opened(url)
    assert other != visit
    assert "mine" not in subjects(url, other)


def opened(url: str, visit: str = "") -> str:
    """Open the page like a browser with this cookie, or none; the cookie it has afterwards."""
    request = urllib.request.Request(url, headers={"Cookie": f"{COOKIE}={visit}"} if visit else {})
    with urllib.request.urlopen(request) as answer:
        given = answer.headers["set-cookie"]
    assert {"Secure", "HttpOnly", "Path=/"} <= set(given.split("; "))
    return given.split(";")[0].removeprefix(f"{COOKIE}=")


def subjects(url: str, visit: str) -> set[str]:
    client = Client(url, verbose=False, headers={"Cookie": f"{COOKIE}={visit}"})
    return {subject["name"] for subject in client.predict(api_name="/list_subjects")}


def test_a_space_offers_the_login_that_it_has(space: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    assert not build_app(build_services(space)).expects_oauth
    monkeypatch.setenv("SYSTEM", "spaces")
    monkeypatch.setenv("SPACE_ID", "someone/space")
    for name in ("OAUTH_CLIENT_ID", "OAUTH_CLIENT_SECRET", "OAUTH_SCOPES"):
        monkeypatch.setattr(f"gradio.oauth.{name}", "word")
    monkeypatch.setattr("gradio.oauth.OPENID_PROVIDER_URL", "https://example.org")
    assert not build_app(build_services(replace(space, space=False))).expects_oauth
    page = build_app(build_services(space))
    assert page.expects_oauth
    app = gr.routes.App.create_app(page)
    assert {"/login/huggingface", "/login/callback"} <= {getattr(route, "path", "") for route in app.routes}
