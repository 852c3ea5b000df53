"""Takes the pictures of the page from a service on ``mini``: ``python docs/serving/page/screenshots.py URL``.

Needs the extra ``drorae[test]`` and Chromium.
"""

import io
import shutil
import sys
from pathlib import Path
from typing import Any

from PIL import Image
from playwright.sync_api import sync_playwright

HERE = Path(__file__).parent
DESKTOP, PHONE = {"width": 1280, "height": 1000}, {"width": 390, "height": 844}
GAP = 24


def main(url: str) -> None:
    """Write the pictures beside this file."""
    with sync_playwright() as started:
        browser = started.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        for scheme in ("light", "dark"):
            take(browser, url, scheme, DESKTOP, 1).save(HERE / f"{scheme}-1280.webp", quality=82, method=6)
        phones = [take(browser, url, scheme, PHONE, 1.5) for scheme in ("light", "dark")]
        browser.close()
    side_by_side(phones).save(HERE / "phone.webp", quality=80, method=6)


def take(browser: Any, url: str, scheme: str, size: dict[str, int], scale: float) -> Image.Image:
    """The page with a sample on it."""
    context = browser.new_context(viewport=size, color_scheme=scheme, device_scale_factor=scale)
    page = context.new_page()
    page.goto(url)
    page.get_by_role("button", name="honeybee").click()
    page.locator("#stage[data-state=compare]").wait_for()
    png = page.screenshot(full_page=True)
    context.close()
    return Image.open(io.BytesIO(png)).convert("RGB")


def side_by_side(pictures: list[Image.Image]) -> Image.Image:
    """In a row, on white."""
    width = sum(picture.width for picture in pictures) + GAP * (len(pictures) - 1)
    row = Image.new("RGB", (width, max(picture.height for picture in pictures)), "white")
    left = 0
    for picture in pictures:
        row.paste(picture, (left, 0))
        left += picture.width + GAP
    return row


if __name__ == "__main__":
    main(sys.argv[1])
