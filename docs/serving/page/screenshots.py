"""Takes the pictures of the page from a service on ``mini``: ``python docs/serving/page/screenshots.py URL``.

Needs the extra ``drorae[test]`` and Chromium.
"""

import io
import shutil
import sys
from collections.abc import Callable
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
            picture = take(browser, url, scheme, DESKTOP, 1, show_photo)
            picture.save(HERE / f"{scheme}-1280.webp", quality=82, method=6)
        phones = [take(browser, url, scheme, PHONE, 1.5, show_photo) for scheme in ("light", "dark")]
        generated = take(browser, url, "light", DESKTOP, 1, show_generated)
        generated.save(HERE / "generated.webp", quality=82, method=6)
        browser.close()
    side_by_side(phones).save(HERE / "phone.webp", quality=80, method=6)


def take(
    browser: Any, url: str, scheme: str, size: dict[str, int], scale: float, show: Callable[[Any], None]
) -> Image.Image:
    """The page with a picture on it."""
    context = browser.new_context(viewport=size, color_scheme=scheme, device_scale_factor=scale)
    page = context.new_page()
    page.goto(url)
    page.locator("#sources").wait_for()
    show(page)
    png = page.screenshot(full_page=True)
    context.close()
    return Image.open(io.BytesIO(png)).convert("RGB")


def show_photo(page: Any) -> None:
    """A sample, compared."""
    page.get_by_role("button", name="honeybee").click()
    page.locator("#stage[data-state=compare]").wait_for()


def show_generated(page: Any) -> None:
    """A class of the second tab."""
    page.locator("input[value=generated]").check()
    page.get_by_role("button", name="bonsai").click()
    page.locator("#stage[data-state=picture]").wait_for()


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
