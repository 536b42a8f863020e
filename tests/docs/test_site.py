"""The site builds without a warning, its links hold, and it fetches nothing from elsewhere."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

from dit_accel import list_methods

ROOT = Path(__file__).parents[2]
FETCHED = {"img": "src", "script": "src", "source": "src", "iframe": "src"}
pytestmark = pytest.mark.slow


class References(HTMLParser):
    """Collects a page's links, its anchors, and what a browser fetches to show it."""

    def __init__(self) -> None:
        super().__init__()
        self.links: list[str] = []
        self.anchors: set[str] = set()
        self.fetched: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = {name: value or "" for name, value in attrs}
        self.anchors |= {found[name] for name in ("id", "name") if name in found}
        if tag == "a" and "href" in found:
            self.links.append(found["href"])
        if tag == "link" and found.get("rel") in ("stylesheet", "icon", "preload", "preconnect"):
            self.fetched.append(found["href"])
        if found.get(FETCHED.get(tag, "")):
            self.fetched.append(found[FETCHED[tag]])


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build the site as `make docs` does."""
    folder = tmp_path_factory.mktemp("site")
    environment = os.environ | {"PYTHONPATH": str(ROOT), "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "WARNING" not in done.stderr
    return folder


@pytest.fixture(scope="module")
def pages(site: Path) -> dict[Path, References]:
    found = {}
    for path in site.rglob("*.html"):
        found[path] = References()
        found[path].feed(path.read_text(encoding="utf-8"))
    return found


def broken(path: Path, pages: dict[Path, References], links: list[str]) -> Iterator[str]:
    """Yield the links of a page that lead to no file or no anchor of the site."""
    for link in links:
        parts = urlsplit(link)
        if parts.scheme or parts.netloc:
            continue
        target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
        target = target / "index.html" if target.is_dir() else target
        if not target.exists():
            yield f"{path.name}: {link}"
            continue
        anchors = pages[target].anchors if target in pages else {parts.fragment}
        if parts.fragment and unquote(parts.fragment) not in anchors:
            yield f"{path.name}: {link} (no such anchor)"


def test_links_and_pictures_lead_somewhere(pages):
    # The page shown for a missing address has absolute links, for a server at the root.
    own = {path: page for path, page in pages.items() if path.name != "404.html"}
    assert not [
        problem
        for path, page in own.items()
        for problem in broken(path, pages, page.links + page.fetched)
    ]


def test_nothing_is_fetched_from_elsewhere(site, pages):
    fetched = {address for page in pages.values() for address in page.fetched}
    assert not [address for address in fetched if urlsplit(address).netloc]
    styles = [path.read_text(encoding="utf-8") for path in site.rglob("*.css")]
    assert not [style for style in styles if "url(http" in style or "@import" in style]


def test_every_method_has_its_page_with_options_and_rows(site):
    for name in list_methods():
        text = (site / "methods" / f"{name}.html").read_text(encoding="utf-8")
        assert 'id="options"' in text
        assert 'id="measured"' in text
        assert "<figure" in text


def test_nothing_is_left_to_be_filled_in(site):
    for path in site.rglob("*.html"):
        text = path.read_text(encoding="utf-8")
        assert "made:" not in text
        assert "{{ " not in text
