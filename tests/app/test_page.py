"""The page as a server: it builds, answers programs by name, and keeps its doors shut."""

from __future__ import annotations

import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from gradio_client import Client, handle_file

from app.main import build_app, launch_options
from app.services import Services, build_services
from app.settings import Settings
from app.ui.library import forget
from mole_diffusion.bases import get_base
from mole_diffusion.png import read_parameters
from tests.app.conftest import Files


@pytest.fixture
def client(services: Services) -> Iterator[Client]:
    page = build_app(services)
    _app, url, _share = page.launch(**launch_options(services.settings), prevent_thread_lock=True)
    yield Client(url, verbose=False)
    page.close()


def test_a_program_can_ask_what_a_file_is(client: Client, services: Services, files: Files) -> None:
    answer = client.predict(handle_file(files.bunny), api_name="/inspect")
    assert (answer["ok"], answer["family"], answer["trigger"]) == (True, "demo", "pqr bunny")
    assert answer["sentence"].startswith("A LoRA of rank 4")
    refused = client.predict(handle_file(next(iter(files.bad))), api_name="/inspect")
    assert not refused["ok"]
    assert "pickle" in refused["sentence"]
    assert list((services.settings.data_dir / "experts").iterdir()) == []


def test_a_program_can_make_a_picture(client: Client) -> None:
    names = [subject["name"] for subject in client.predict(api_name="/list_subjects")]
    arguments = {"subjects": names, "method": "nla", "seed": 5, "steps": 3}
    pictures, parameters = client.predict("a zwx robot", **arguments, api_name="/generate")
    assert len(pictures) == 1
    assert read_parameters(Path(pictures[0])) == parameters[0]
    assert (parameters[0]["seed"], parameters[0]["method"]) == (5, "nla")
    assert parameters[0]["guidance"] == get_base("demo").default_guidance


def test_a_programs_mistake_is_a_sentence(client: Client) -> None:
    with pytest.raises(Exception, match="no subject 'dragon'"):
        client.predict("a dragon", subjects=["dragon"], api_name="/generate")


def test_only_named_calls_are_public(client: Client) -> None:
    named = client.view_api(return_format="dict")
    assert isinstance(named, dict)
    assert set(named["named_endpoints"]) == {"/inspect", "/list_subjects", "/generate"}


@pytest.mark.parametrize("path", ["/monitoring/summary", "/monitoring", "/gradio_api/file={data}/library.db"])
def test_nothing_private_is_served(client: Client, services: Services, path: str) -> None:
    address = client.src.rstrip("/") + path.format(data=services.settings.data_dir)
    with pytest.raises(urllib.error.HTTPError):
        urllib.request.urlopen(address)


def test_a_password_closes_the_page(settings: Settings) -> None:
    options = launch_options(replace(settings, password="word"))
    assert options["auth"]("anyone", "word")
    assert not options["auth"]("anyone", "Word")


def test_what_the_page_does_not_need_is_switched_off(settings: Settings) -> None:
    options = launch_options(settings)
    assert options["ssr_mode"] is False
    assert options["enable_monitoring"] is False
    assert options["share"] is False
    assert options["allowed_paths"] == []
    assert "googleapis" not in repr(options["theme"].to_dict())


def test_a_space_that_cannot_train_still_builds(settings: Settings) -> None:
    services = build_services(replace(settings, space=True, zero_gpu=True))
    assert "ZeroGPU" in str(build_app(services).get_config_file())


def test_before_zero_gpu_forks_no_thread_holds_a_lock(settings: Settings) -> None:
    services = build_services(replace(settings, space=True, zero_gpu=True, warm_up=True))
    services.start()
    assert "mole-warm-up" not in {thread.name for thread in threading.enumerate()}


def test_an_upload_does_not_stay_in_the_cache(tmp_path: Path) -> None:
    path = tmp_path / "hash" / "private.safetensors"
    path.parent.mkdir()
    path.write_bytes(b"x")
    forget(path)
    assert not path.parent.exists()
    forget(path)
