"""A page as a picture, by Chromium: a laptop's width in the light scheme beside a phone's in the dark one.

python docs/screenshot.py runs/digits_vit/report.html docs/first_run/report.png
"""

from __future__ import annotations

import io
import shutil
import sys
from pathlib import Path

from PIL import Image
from playwright.sync_api import sync_playwright

VIEWS = ((1280, "light"), (390, "dark"))
HEIGHT, GAP = 2400, 40  # pixels at most, and between the views


def main(page: str, picture: str) -> None:
    """Write the picture of a page."""
    views = []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        for width, scheme in VIEWS:
            shown = browser.new_page(viewport={"width": width, "height": HEIGHT}, color_scheme=scheme)
            shown.goto(Path(page).resolve().as_uri())
            views.append(Image.open(io.BytesIO(shown.screenshot(full_page=True))).convert("RGB"))
        browser.close()
    views = [view.crop((0, 0, view.width, min(view.height, HEIGHT))) for view in views]
    whole = Image.new(
        "RGB", (sum(view.width + GAP for view in views) - GAP, max(view.height for view in views)), "white"
    )
    left = 0
    for view in views:
        whole.paste(view, (left, 0))
        left += view.width + GAP
    whole.quantize(256).save(picture, optimize=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
