"""Chromium without a window."""

from __future__ import annotations

import shutil
from collections.abc import Iterator

import pytest
from playwright.sync_api import Browser, Error, Page, sync_playwright


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    """The system's Chromium, or the one that `playwright install chromium` brings."""
    with sync_playwright() as playwright:
        try:
            opened = playwright.chromium.launch(
                executable_path=shutil.which("chromium"),
                args=["--no-sandbox"],  # containers run as root
            )
        except Error as error:
            pytest.fail(f"Chromium does not start: apt install chromium, or playwright install chromium: {error}")
        yield opened
        opened.close()


@pytest.fixture(params=["light", "dark"])
def scheme(request: pytest.FixtureRequest) -> str:
    """What the reader's system prefers."""
    return request.param


@pytest.fixture(params=[1280, 390])
def page(request: pytest.FixtureRequest, browser: Browser, scheme: str) -> Iterator[Page]:
    """A laptop's and a phone's width; an error of a script or a request to elsewhere fails the test."""
    opened, complaints = browser.new_page(viewport={"width": request.param, "height": 900}, color_scheme=scheme), []
    opened.on("pageerror", lambda error: complaints.append(str(error)))
    opened.on("console", lambda message: complaints.append(message.text) if message.type == "error" else None)
    opened.on("request", lambda asked: None if asked.url.startswith(LOCAL) else complaints.append(asked.url))
    yield opened
    opened.close()
    assert complaints == []


LOCAL = ("file:", "data:", "blob:", "http://127.0.0.1")
