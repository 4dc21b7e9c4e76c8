"""The documentation as its readers see it."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from playwright.sync_api import Page

pytestmark = pytest.mark.browser
ROOT = Path(__file__).parents[2]
# What is wider than its frame, or than the window
CUT = """() => [
  ...[...document.querySelectorAll(".md-typeset__scrollwrap, pre > code"), document.documentElement]
    .filter(part => part.scrollWidth > part.clientWidth).map(part => part.innerText.slice(0, 80)),
  ...[...document.querySelectorAll(".md-content img")]
    .filter(image => !image.naturalWidth || image.getBoundingClientRect().right > innerWidth).map(image => image.src),
]"""


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *unused: object) -> None:
        """Nothing."""


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Its address."""
    for command in (["docs/site.py"], ["-m", "zensical", "build", "--clean", "--strict"]):
        subprocess.run([sys.executable, *command], check=True, cwd=ROOT, stdout=subprocess.DEVNULL)
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=ROOT / "site"))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


def test_nothing_is_cut_on_any_page(page: Page, site: str):
    places = [path.parent.relative_to(ROOT / "site") for path in (ROOT / "site").rglob("index.html")]
    assert len(places) > 50
    cut = {}
    for place in places:
        page.goto(f"{site}/{place}/")
        if found := page.evaluate(CUT):
            cut[str(place)] = found
    assert cut == {}


def test_the_search_finds_pages(page: Page, site: str):
    page.goto(f"{site}/")
    page.wait_for_load_state("networkidle")
    page.keyboard.press("Control+k")
    page.keyboard.type("plateau", delay=20)
    page.locator("a", has_text="Longer, shorter, along another curve").click()
    page.wait_for_url("**/training/#longer-shorter-along-another-curve*")
