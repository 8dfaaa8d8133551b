"""The page in a real browser: what a newcomer sees, does and gets, on a desktop and on a phone."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Page, expect, sync_playwright

from app.main import build_app, launch_options
from app.services import Services, build_services
from app.settings import Settings
from tests.app.conftest import Files
from tests.tiny import cut_out, tiny_sd

pytestmark = [pytest.mark.browser, pytest.mark.timeout(1800)]

CHROMIUM = Path("/usr/bin/chromium")
FLAGS = [
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync", "--disable-dev-shm-usage",
]  # fmt: skip
DESKTOP, PHONE = {"width": 1280, "height": 800}, {"width": 390, "height": 844}
PATIENCE = 600_000
"""Milliseconds that a wait may take; on an idle core nothing takes a twentieth of it."""


@pytest.fixture(scope="module")
def shipped(assets_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny assets with a composition, as the product ships one."""
    from mole_diffusion import Expert, GateConfig, compose

    folder = tmp_path_factory.mktemp("shipped") / "assets"
    shutil.copytree(assets_folder, folder)
    demo = folder / "demo"
    experts = [Expert.load(demo / "experts" / f"{name}.safetensors", name=name) for name in ("robot", "bunny")]
    compose(tiny_sd(), experts, gate=GateConfig(scope="token")).save(demo / "compositions" / "robot+bunny.safetensors")
    return folder


@dataclass
class Site:
    """A served page and what went wrong in the browser while it was used."""

    url: str
    services: Services
    errors: list[str] = field(default_factory=list)
    strangers: list[str] = field(default_factory=list)
    reloaded: bool = False


@pytest.fixture
def site(shipped: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Site]:
    monkeypatch.setenv("MOLE_ASSETS", str(shipped))
    services = build_services(Settings(data_dir=tmp_path / "data", port=0, device="cpu", warm_up=False))
    page = build_app(services)
    _app, url, _share = page.launch(**launch_options(services.settings), prevent_thread_lock=True)
    services.start()
    yield Site(url, services)
    services.stop()
    page.close()


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    if not CHROMIUM.exists():
        pytest.fail(f"{CHROMIUM} is missing: install the Debian package `chromium` (apt-get install chromium).")
    with sync_playwright() as playwright:
        expect.set_options(timeout=PATIENCE)
        started = playwright.chromium.launch(executable_path=str(CHROMIUM), args=FLAGS)
        yield started
        started.close()


Open = Callable[..., Page]


@pytest.fixture
def visit(browser: Browser, site: Site) -> Iterator[Open]:
    """Open the page; afterwards no console error, no request to another host and no overflow must have been seen."""
    contexts = []

    def opened(viewport: dict[str, int], scheme: str = "light") -> Page:
        context = browser.new_context(viewport=viewport, color_scheme=scheme)  # type: ignore[arg-type]
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(PATIENCE)
        page.on("console", lambda message: site.errors.append(message.text) if message.type == "error" else None)
        page.on("pageerror", lambda error: site.errors.append(str(error)))
        page.on("request", lambda request: site.strangers.append(request.url) if foreign(request.url, site) else None)
        page.goto(site.url)
        page.locator("#subjects label.selected").nth(1).wait_for()
        return page

    yield opened
    for context in contexts:
        context.close()
    cut_off = ("AbortError", "Connection errored out") if site.reloaded else ()
    assert [error for error in site.errors if not any(words in error for words in cut_off)] == []
    assert site.strangers == []


def reload(page: Page, site: Site) -> None:
    """Reload; the browser cuts off the requests that the old page has under way, and Gradio says so."""
    site.reloaded = True
    page.reload()


def foreign(url: str, site: Site) -> bool:
    return not url.startswith((site.url, "data:", "blob:", site.url.replace("http", "ws", 1)))


def keep(page: Page, name: str) -> None:
    """A screenshot of the whole page among the artefacts; nothing may stick out of the window."""
    folder = Path(os.environ.get("MOLE_ARTEFACTS") or Path(__file__).parents[2] / ".artefacts")
    folder.mkdir(parents=True, exist_ok=True)
    page.screenshot(path=str(folder / f"{name}.png"), full_page=True)
    over = page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth")
    assert over == 0, f"{name} is {over} pixels wider than the window"
    cut = page.evaluate(
        """() => [...document.querySelectorAll('.gradio-container *')].filter(e => e.offsetParent
             && !e.closest('svg, .tab-container, [aria-hidden=true]')
             && e.getBoundingClientRect().right > window.innerWidth + 1).map(e => e.className).slice(0, 3)"""
    )
    assert cut == [], f"{name}: {cut} stick out of the window"


def tab(page: Page, name: str) -> None:
    page.get_by_role("tab", name=name, exact=True).click()
    expect(page.get_by_role("tab", name=name, exact=True)).to_have_attribute("aria-selected", "true")


def set_steps(page: Page, fold: str, slider: str, steps: int) -> None:
    page.locator(fold).get_by_text("Advanced", exact=True).click()
    number = page.locator(f"{slider} input[type=number]")
    number.fill(str(steps))
    number.press("Tab")


def wait_for_scores(page: Page) -> None:
    page.locator("#results .scores").wait_for()
    expect(page.locator("#first .cell img")).to_be_visible()


def test_one_click_makes_a_scored_picture_with_both_subjects(visit: Open, site: Site) -> None:
    page = visit(DESKTOP)
    expect(page.locator("#prompt textarea")).to_have_value("a zwx bunny and a zwx robot on a green background")
    keep(page, "first-visit-desktop")
    page.locator("#generate").click()
    page.locator("#first .frame img").wait_for()
    keep(page, "generating-desktop")
    wait_for_scores(page)
    expect(page.locator("#results thead")).to_contain_text("Learned gates")
    expect(page.locator("#results thead")).to_contain_text("NLA")
    expect(page.locator("#results .group")).to_have_text(["alignment (demo CLIP)", "identity (demo CLIP image tower)"])
    for place in ("#first", "#second"):
        expect(page.locator(f"{place} .legend b")).to_have_count(3)
        expect(page.locator(f"{place} .chart path")).to_have_count(3)
    page.locator("#first .frame").hover()
    keep(page, "generated-desktop")
    with page.expect_download() as download:
        page.locator("#first a[download]").click()
    from mole_diffusion.png import read_parameters

    saved = read_parameters(Path(download.value.path()))
    assert (saved["method"], saved["prompt"]) == ("gates", "a zwx bunny and a zwx robot on a green background")
    reload(page, site)
    wait_for_scores(page)


def test_two_uploads_are_trained_and_generated_through_a_reload(visit: Open, site: Site, files: Files) -> None:
    page = visit(DESKTOP)
    tab(page, "Library")
    page.locator("#upload input[type=file]").set_input_files([str(path) for path in files.bad])
    refusals = page.locator("#upload-notes .note.bad")
    expect(refusals).to_have_count(len(files.bad))
    sentences = refusals.all_inner_texts()
    assert len(set(sentences)) == len(files.bad)
    for path, word in files.bad.items():
        assert any(path.name in sentence and word in sentence for sentence in sentences), (path.name, sentences)
    assert list((site.services.settings.data_dir / "experts").iterdir()) == []
    keep(page, "refused-desktop")
    page.locator("#upload input[type=file]").set_input_files([str(files.robot), str(files.bunny)])
    expect(page.locator("#cards .card")).to_have_count(4)
    add_views(page, "tin robot", "red", files.robot.parent)
    add_views(page, "snow bunny", "blue", files.robot.parent)
    keep(page, "library-desktop")
    page.locator("#onward").click()
    expect(page.locator("#experts label.selected")).to_have_text(["snow bunny", "tin robot"])
    set_steps(page, "#train-advanced", "#train-steps", 100)
    page.locator("#train").click()
    page.locator("#jobs .chip.live").wait_for()
    while (job := site.services.jobs.list()[0]).pid is None:
        page.wait_for_timeout(50)
    reload(page, site)
    tab(page, "Train")
    expect(page.locator("#jobs .job")).to_have_count(1)
    expect(page.locator("#jobs .job")).to_have_attribute("data-id", job.id)
    page.locator("#jobs .chip.live").wait_for()
    now = site.services.jobs.list()[0]
    assert (now.id, now.state, now.pid, now.attempts) == (job.id, "running", job.pid, 1)
    expect(page.locator("#jobs .job strong")).to_contain_text("tin robot")
    expect(page.locator("#job-head")).not_to_be_empty()
    page.locator("#job-curve .plot").wait_for()
    keep(page, "training-desktop")
    page.locator("#use-gates").wait_for()
    keep(page, "trained-desktop")
    page.locator("#use-gates").click()
    expect(page.locator("#subjects label.selected")).to_have_text(["snow bunny", "tin robot"])
    expect(page.locator("#prompt textarea")).to_have_value("a pqr bunny and a qvx robot on a green background")
    page.locator("#generate").click()
    wait_for_scores(page)
    expect(page.locator("#results .who")).to_have_count(5)
    keep(page, "composed-desktop")


def test_a_new_subject_is_trained_paused_and_joins_the_library(visit: Open, site: Site, tmp_path: Path) -> None:
    page = visit(DESKTOP)
    tab(page, "Train")
    page.locator("#train-kind label", has_text="A new subject").click()
    paths = [tmp_path / f"{number}.png" for number in range(4)]
    for number, path in enumerate(paths):
        cut_out("#d02020", turn=20.0 * number).save(path)
    page.locator("#subject-pictures input[type=file]").set_input_files([str(path) for path in paths])
    expect(page.locator("#subject-strip img")).to_have_count(4)
    page.locator("#subject-token input").fill("qvx")
    page.locator("#subject-class input").fill("cup")
    page.locator("#subject-advanced").get_by_text("Advanced", exact=True).click()
    page.locator("#subject-steps input").fill("20")
    page.locator("#subject-steps input").press("Tab")
    keep(page, "new-subject-desktop")
    page.locator("#train-subject").click()
    page.locator("#pause-job").click()
    expect(page.locator("#job-head")).to_contain_text("it can go on from there")
    keep(page, "paused-desktop")
    page.locator("#resume-job").click()
    expect(page.locator("#job-head")).to_contain_text("The subject is in the library")
    keep(page, "new-subject-trained-desktop")
    tab(page, "Library")
    expect(page.locator("#cards .card", has_text="qvx cup")).to_be_visible()
    entry = next(entry for entry in site.services.library.entries() if entry.trigger == "qvx cup")
    assert len(entry.views) == 4


def add_views(page: Page, name: str, colour: str, folder: Path) -> None:
    paths = [folder / f"{colour}-{index}.png" for index in range(3)]
    for index, path in enumerate(paths):
        cut_out(colour, turn=12.0 * index).save(path)
    page.locator("#cards .card", has_text=name).click()
    expect(page.locator("#editor input").first).to_have_value(name)
    page.locator("#views input[type=file]").set_input_files([str(path) for path in paths])
    expect(page.locator("#upload-notes")).to_contain_text("3 pictures stored")
    expect(page.locator("#editor .strip img")).to_have_count(3)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_page_fits_a_phone(visit: Open, scheme: str) -> None:
    page = visit(PHONE, scheme)
    keep(page, f"first-visit-phone-{scheme}")
    page.locator("#generate").click()
    wait_for_scores(page)
    keep(page, f"generated-phone-{scheme}")
    tab(page, "Library")
    page.locator("#cards .card").first.click()
    page.locator("#editor").wait_for()
    keep(page, f"library-phone-{scheme}")
    tab(page, "Train")
    page.locator("#train-advanced").get_by_text("Advanced", exact=True).click()
    keep(page, f"train-phone-{scheme}")
    page.locator("#train-kind label", has_text="A new subject").click()
    page.locator("#train-subject").wait_for()
    keep(page, f"new-subject-phone-{scheme}")


def test_a_picture_can_be_stopped(visit: Open, site: Site) -> None:
    page = visit(DESKTOP, "dark")
    set_steps(page, ".fold >> visible=true", "#steps", 100)
    page.locator("#generate").click()
    page.locator("#first .frame img").wait_for()
    page.locator("#stop").click()
    expect(page.locator("#status")).to_contain_text("Stopped.")
    expect(page.locator("#generate")).to_be_enabled()
    keep(page, "stopped-desktop-dark")


def test_an_empty_prompt_is_answered_with_a_sentence(visit: Open) -> None:
    page = visit(DESKTOP)
    page.locator("#prompt textarea").fill(" ")
    page.locator("#generate").click()
    expect(page.locator(".toast-wrap")).to_contain_text("The prompt is empty")
    expect(page.locator("#stage")).to_be_hidden()
