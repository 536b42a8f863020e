"""The page served by a thread of this process, and a browser to look at it."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, ConsoleMessage, Page, sync_playwright

from dit_accel.app.server import serving
from dit_accel.app.settings import AppSettings

MAX_STEPS = 60


@dataclass
class Served:
    """The page's address, what it was started with, and what browsers complained of."""

    address: str
    output: Path
    complaints: list[str] = field(default_factory=list)


@pytest.fixture(scope="session")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    output = tmp_path_factory.mktemp("results")
    settings = AppSettings(port=0, output=output, max_side=256, max_frames=33, max_steps=MAX_STEPS)
    with pytest.MonkeyPatch.context() as patch, serving(settings) as (server, address):
        # What is measured for a budget stays out of the user's own folder.
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        # Connections wait in the listening socket until the server is there.
        thread = threading.Thread(target=server.run)
        thread.start()
        yield Served(address, output)
        server.should_exit = True
        thread.join()


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    """Debian's chromium: a download of playwright's own is not needed."""
    path = shutil.which("chromium") or shutil.which("chromium-browser")
    if path is None:
        pytest.skip("there is no chromium here: apt-get install chromium, or make browser")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def open_page(browser: Browser, served: Served) -> Iterator[Any]:
    """Open the page in a fresh profile, as often as called; no complaint in any console is left."""
    contexts = []

    def listen(message: ConsoleMessage) -> None:
        if message.type == "error":
            served.complaints.append(message.text)

    def open_(**options: Any) -> Page:
        context = browser.new_context(
            **{"viewport": {"width": 1280, "height": 900}, "reduced_motion": "reduce", **options}
        )
        contexts.append(context)
        page = context.new_page()
        page.on("console", listen)
        page.on("pageerror", lambda error: served.complaints.append(str(error)))
        page.on("request", lambda request: _stays_home(request.url, served))
        page.goto(served.address)
        page.locator("#generate-start").wait_for()
        return page

    served.complaints.clear()
    yield open_
    for context in contexts:
        context.close()
    assert served.complaints == []


def _stays_home(url: str, served: Served) -> None:
    if not url.startswith((served.address, "data:", "blob:")):
        served.complaints.append(f"asked another server for {url}")
