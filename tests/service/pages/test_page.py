"""The page in a real Chromium, against a real service: one browser, and a fresh page for each test.

Every test ends with a look at what the browser complained of: a violation of the policy, an error in a
script, a request to another host.
"""

import base64
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest
import safetensors.torch
import torch

from model.tokenizer import Tokenizer
from service.app import create_app
from service.settings import Settings

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
CHROMIUM = next((path for name in BROWSERS if (path := shutil.which(name))), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed")

DESKTOP, PHONE = {"width": 1280, "height": 900}, {"width": 390, "height": 844}
KEY = "0123456789abcdef"
PATIENCE_MS = 60_000  # on a machine that others keep busy
# Pixel by pixel, as the canvas on the stage has it.
READ_CANVAS = "canvas => [...canvas.getContext('2d').getImageData(0, 0, canvas.width, canvas.height).data]"
ADD_SCRIPT = "() => document.body.append(Object.assign(document.createElement('script'), {text: '1'}))"
DROP = """(file) => {
    const bytes = Uint8Array.from(atob(file.base64), (character) => character.charCodeAt(0));
    const transfer = new DataTransfer();
    transfer.items.add(new File([bytes], file.name, { type: file.type }));
    const event = file.event === 'paste'
        ? new ClipboardEvent('paste', { clipboardData: transfer, bubbles: true })
        : new DragEvent('drop', { dataTransfer: transfer, bubbles: true, cancelable: true });
    document.body.dispatchEvent(event);
}"""


@dataclass
class Watched:
    """A page, and what the browser said of it."""

    page: Any
    complaints: list[str] = field(default_factory=list)
    hosts: set[str] = field(default_factory=set)

    def open(self, url: str) -> Any:
        self.page.goto(url)
        return self.page

    def expect(self, selector: str) -> Any:
        return playwright.expect(self.page.locator(selector))

    def give(self, name: str, content: bytes) -> None:
        """Choose a file."""
        file = {"name": name, "mimeType": "image/png" if name.endswith(".png") else "", "buffer": content}
        self.page.set_input_files("#file", file)

    def wait_for(self, state: str) -> None:
        self.page.locator(f"#stage[data-state={state}]").wait_for()


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    playwright.expect.set_options(timeout=PATIENCE_MS)
    with playwright.sync_playwright() as started:
        running = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        yield running
        running.close()


@pytest.fixture
def open_page(browser: Any) -> Iterator[Callable[..., Watched]]:
    contexts, all_watched = [], []

    def make(size: dict[str, int] = DESKTOP, scheme: str = "light") -> Watched:
        context = browser.new_context(viewport=size, color_scheme=scheme, reduced_motion="reduce")
        context.set_default_timeout(PATIENCE_MS)
        contexts.append(context)
        watched = Watched(context.new_page())
        all_watched.append(watched)
        watched.page.on("pageerror", lambda error: watched.complaints.append(f"script: {error}"))
        watched.page.on("request", lambda request: watched.hosts.add(httpx.URL(request.url).host))
        watched.page.on(
            "console",
            lambda line: watched.complaints.append(line.text) if line.type == "error" else None,
        )
        return watched

    yield make
    for context in contexts:
        context.close()
    for watched in all_watched:
        # Chromium reports every answer that is no 2xx so; tests of errors say what the page made of it.
        assert [text for text in watched.complaints if "Failed to load resource" not in text] == []
        assert watched.hosts <= {"127.0.0.1", ""}, "blob: has no host"


@pytest.fixture
def shown(open_page: Callable[..., Watched], client: httpx.Client, png: bytes) -> Watched:
    """The page with a photo on it."""
    watched = open_page()
    watched.open(str(client.base_url))
    watched.expect("#status").to_have_attribute("data-state", "ready")
    watched.give("my photo.png", png)
    watched.wait_for("compare")
    return watched


def run_python(script: str, folder: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[3] / "client")}
    subprocess.run([sys.executable, "-c", script], cwd=folder, env=environment, check=True, timeout=60)


def test_a_photo_becomes_pictures_and_figures(shown: Watched, client: httpx.Client, png: bytes) -> None:
    options = {"format": "json", "router": "mean"}
    enriched = client.post("/reconstruct", params=options, content=png).json()
    base = client.post("/reconstruct", params={"format": "json", "latent": "base"}, content=png).json()
    shown.expect("#psnr-enriched").to_have_text(f"{enriched['psnr'][0]:.2f}")
    shown.expect("#ssim-base").to_have_text(f"{base['ssim'][0]:.3f}".replace("-", "−"))
    bars = shown.page.locator("#router button")
    assert [text.split()[-1] for text in bars.all_text_contents()] == ["2", "3", "4"]
    for bar, weight in zip(bars.all(), enriched["router_mean"][0], strict=True):
        assert f"{weight:.3f}" in (bar.get_attribute("title") or "")
    stages = " ".join(shown.page.locator("#times-legend li").all_text_contents())
    for stage in ("run the model", "write the answer", "network"):
        assert stage in stages
    assert shown.page.locator(".tag").all_text_contents() == ["Original", "Enriched"]


def test_the_divider_by_pointer_and_by_keyboard(shown: Watched) -> None:
    page = shown.page
    divider = page.locator("#split")
    box = divider.bounding_box()
    page.mouse.click(box["x"] + 0.25 * box["width"], box["y"] + 0.5 * box["height"])
    assert float(divider.input_value()) == pytest.approx(25, abs=1)
    place = page.locator(".divider").bounding_box()
    assert place["x"] - box["x"] == pytest.approx(0.25 * box["width"], abs=8)
    before = float(divider.input_value())
    for key, step in (("ArrowRight", 0.5), ("PageUp", 10), ("ArrowLeft", -0.5)):
        divider.press(key)
        before += step
        assert float(divider.input_value()) == pytest.approx(before, abs=0.01), key
    divider.press("Home")
    assert divider.input_value() == "0"
    assert "Enriched" in divider.get_attribute("aria-valuetext")


def test_the_difference_is_eight_times_what_differs(shown: Watched) -> None:
    page = shown.page
    pixels = {}
    for name in ("original", "enriched"):
        page.locator(f"input[name=left][value={name}]").check()
        pixels[name] = page.locator("#left-picture").evaluate(READ_CANVAS)
    page.locator("#difference").check()
    difference = page.locator("#left-picture").evaluate(READ_CANVAS)
    pairs = zip(pixels["original"], pixels["enriched"], strict=True)
    expected = [min(255, 8 * abs(first - second)) for first, second in pairs]
    colours = [index for index in range(len(expected)) if index % 4 < 3]
    assert [difference[index] for index in colours] == [expected[index] for index in colours]
    page.locator("input[name=left][value=original]").check()
    page.locator("#difference").uncheck()
    page.locator("#difference").check()  # the original would differ by nothing
    assert "Base" in page.locator(".tag.left").text_content()


def test_a_layer_shows_its_map(shown: Watched) -> None:
    page = shown.page
    second = page.locator("#router button").nth(1)
    second.press("Enter")
    shown.expect("#map").to_be_visible()
    assert second.get_attribute("aria-pressed") == "true"
    assert "from" in page.locator("#router-note").text_content()
    page.keyboard.press("Escape")
    shown.expect("#map").to_be_hidden()


def test_latents_go_out_and_come_back(
    shown: Watched, client: httpx.Client, png: bytes, tmp_path: Path
) -> None:
    page = shown.page
    page.select_option("#kind", "base")
    with page.expect_download() as download:
        page.get_by_role("button", name="Download latents").click()
    assert download.value.suggested_filename == "my photo-base.safetensors"
    path = tmp_path / "photo.safetensors"
    download.value.save_as(path)
    expected = client.post("/encode?latent=base", content=png).content
    assert len(path.read_bytes()) == len(expected)
    found, expected = (safetensors.torch.load(data)["latents"] for data in (path.read_bytes(), expected))
    torch.testing.assert_close(found, expected)
    shown.give("photo.safetensors", path.read_bytes())
    shown.wait_for("picture")
    facts = page.locator("#file-facts").text_content()
    for fact in ("1 × 32 × 8 × 8", "F16", "base", "tiny"):
        assert fact in facts
    shown.expect("#quality-card").to_be_hidden()
    with page.expect_download() as picture:
        page.get_by_role("link", name="Save picture").click()
    assert (
        Path(picture.value.path()).read_bytes() == client.post("/decode", content=path.read_bytes()).content
    )


def test_a_file_of_several_latents(shown: Watched, latents: Any) -> None:
    shown.give("three.safetensors", safetensors.torch.save({"latents": latents}))
    shown.wait_for("picture")
    pictures = shown.page.locator("#strip button")
    playwright.expect(pictures).to_have_count(3)
    first = shown.page.locator("#left-picture").evaluate(READ_CANVAS)
    pictures.nth(2).click()
    assert shown.page.locator("#left-picture").evaluate(READ_CANVAS) != first


def test_new_pictures_of_the_bundled_generator(
    open_page: Callable[..., Watched], serve: Any, tmp_path: Path
) -> None:
    with serve(create_app(Settings(checkpoint="mini", batch_size=4))) as running:
        watched = open_page(PHONE)
        page = watched.open(running.url)
        page.locator("input[value=generated]").check()
        watched.expect("#photos").to_be_hidden()
        classes = page.locator("#generated button")
        playwright.expect(classes).to_have_count(12)
        for chosen in (classes.first, page.get_by_role("button", name="sunflower")):
            chosen.click()
            playwright.expect(chosen).to_have_attribute("aria-pressed", "true")
            watched.wait_for("picture")
        playwright.expect(page.locator("#strip button")).to_have_count(4)
        watched.expect("#told").to_have_text("4 pictures of sunflower.safetensors")
        assert "4 × 192 × 16 × 16" in page.locator("#file-facts").text_content()
        assert page.evaluate("() => document.documentElement.scrollWidth") <= PHONE["width"]
        page.locator("input[value=python]").check(force=True)
        run_python(page.locator("#lines").text_content(), tmp_path)
    assert (tmp_path / "reconstructed.png").exists()


def test_no_new_pictures_for_another_tokenizer(shown: Watched) -> None:
    shown.expect("#sources").to_be_hidden()
    shown.expect("#photos").to_be_visible()


@pytest.mark.parametrize("event", ["drop", "paste"])
def test_dropping_and_pasting(
    open_page: Callable[..., Watched], client: httpx.Client, png: bytes, event: str
) -> None:
    watched = open_page(scheme="dark")
    page = watched.open(str(client.base_url))
    watched.expect("#status").to_have_attribute("data-state", "ready")
    file = {"base64": base64.b64encode(png).decode(), "name": "x.png", "type": "image/png", "event": event}
    page.evaluate(DROP, file)
    watched.wait_for("compare")


def test_by_keyboard_alone_on_a_phone(open_page: Callable[..., Watched], client: httpx.Client) -> None:
    watched = open_page(PHONE)
    page = watched.open(str(client.base_url))
    watched.expect("#status").to_have_attribute("data-state", "ready")
    assert page.evaluate("() => document.documentElement.scrollWidth") <= PHONE["width"]
    for _ in range(12):
        page.keyboard.press("Tab")
        if page.locator("[data-address]:focus").count():
            break
    page.keyboard.press("Enter")
    watched.wait_for("compare")
    assert page.evaluate("() => document.documentElement.scrollWidth") <= PHONE["width"]
    assert "honeybee.jpg" in page.locator("#told").text_content()


def test_the_shown_lines_run(shown: Watched, client: httpx.Client, png: bytes, tmp_path: Path) -> None:
    (tmp_path / "my photo.png").write_bytes(png)
    page = shown.page
    lines = page.locator("#lines").text_content().splitlines()
    assert len(lines) == 3
    for line in lines if shutil.which("curl") else ():
        command = line.replace("curl -s", "curl -sS --fail-with-body")
        subprocess.run(["bash", "-c", command], cwd=tmp_path, check=True, capture_output=True, timeout=60)
    page.locator("input[value=python]").check(force=True)
    run_python(page.locator("#lines").text_content(), tmp_path)
    assert (tmp_path / "reconstructed.png").exists()
    assert (tmp_path / "latents.safetensors").exists()


def test_errors_in_the_services_own_words(shown: Watched, client: httpx.Client, latents: Any) -> None:
    notice = shown.page.locator("#notice")
    foreign = safetensors.torch.save({"latents": latents}, {"checkpoint_sha256": "0" * 64})
    for name, path, content in (
        ("broken.png", "/reconstruct", b"\x89PNG\r\n\x1a\nno picture"),
        ("foreign.safetensors", "/decode", foreign),
    ):
        shown.give(name, content)
        detail = client.post(path, content=content).json()["detail"]
        playwright.expect(notice).to_contain_text(detail)
        shown.wait_for("empty")
    notice.get_by_role("button", name="Dismiss").click()
    playwright.expect(notice).to_be_hidden()


def test_too_busy_counts_down_and_tries_again(shown: Watched, png: bytes) -> None:
    page = shown.page
    page.clock.install()
    problem = {"title": "Queue full", "detail": "The queue is full.", "status": 429, "request_id": "r" * 32}
    refused: list[str] = []

    def refuse(route: Any) -> None:
        refused.append(route.request.url)
        headers = {"Retry-After": "500", "Content-Type": "application/problem+json"}
        route.fulfill(status=429, headers=headers, body=json.dumps(problem))

    page.route("**/reconstruct*", refuse)
    shown.give("again.png", png)
    notice = page.locator("#notice")
    playwright.expect(notice).to_contain_text(re.compile(r"Trying again in (500|4\d\d) s"))
    playwright.expect(notice).to_contain_text("The queue is full.")
    page.clock.fast_forward(200_000)
    playwright.expect(notice).to_contain_text(re.compile(r"Trying again in (300|2\d\d|1\d\d) s"))
    page.unroute("**/reconstruct*")
    assert len(refused) == 2
    page.clock.fast_forward(400_000)
    shown.wait_for("compare")
    playwright.expect(notice).to_be_hidden()


def test_a_service_that_is_gone(shown: Watched, png: bytes) -> None:
    shown.page.route("**/reconstruct*", lambda route: route.abort("connectionrefused"))
    shown.give("lost.png", png)
    notice = shown.page.locator("#notice")
    playwright.expect(notice).to_contain_text("cannot be reached")
    shown.page.unroute("**/reconstruct*")
    notice.get_by_role("button", name="Try again").click()
    shown.wait_for("compare")


def test_a_key_is_asked_for_and_kept_in_memory(
    open_page: Callable[..., Watched], serve: Any, tokenizer: Tokenizer, png: bytes
) -> None:
    with serve(create_app(Settings(api_keys=KEY, batch_size=1), tokenizer)) as running:
        watched = open_page()
        page = watched.open(running.url)
        for key, words in (("wrong", "answers only with a key"), (KEY, "does not know this key")):
            watched.expect("#key-why").to_contain_text(words)
            page.locator("#key").fill(key)
            page.get_by_role("button", name="Use key").click()
        watched.expect("#status").to_have_attribute("data-state", "ready")
        watched.give("x.png", png)
        watched.wait_for("compare")
        assert "Bearer $DRORAE_API_KEY" in page.locator("#lines").text_content()
        kept = page.evaluate(
            "() => JSON.stringify([{...localStorage}, {...sessionStorage}, document.cookie])"
        )
        assert kept == '[{},{},""]'
        assert KEY not in page.content()
        docs = watched.open(f"{running.url}/docs")
        docs.locator("#key").fill(KEY)
        docs.get_by_role("button", name="Use key").click()
        docs.locator(".opblock").first.wait_for()


def test_the_api_is_described_offline_and_can_be_tried(
    open_page: Callable[..., Watched], client: httpx.Client
) -> None:
    watched = open_page()
    page = watched.open(f"{client.base_url}/docs")
    page.locator("#operations-default-info .opblock-summary-control").click()
    page.get_by_role("button", name="Try it out").click()
    page.get_by_role("button", name="Execute").click()
    page.locator(".live-responses-table .response-col_status", has_text="200").first.wait_for()


def test_the_example_of_a_json_body_runs(open_page: Callable[..., Watched], client: httpx.Client) -> None:
    page = open_page().open(f"{client.base_url}/docs")
    page.locator("#operations-default-encode .opblock-summary-control").click()
    page.get_by_role("button", name="Try it out").click()
    page.locator(".opblock-section-request-body select").select_option("application/json")
    page.get_by_role("button", name="Execute").click()
    page.locator(".live-responses-table .response-col_status", has_text="200").first.wait_for()


def test_the_policy_stops_other_code(open_page: Callable[..., Watched], client: httpx.Client) -> None:
    watched = open_page()
    page = watched.open(str(client.base_url))
    watched.expect("#status").to_have_attribute("data-state", "ready")
    with page.expect_console_message(lambda line: "Content Security Policy" in line.text):
        page.evaluate(ADD_SCRIPT)
    watched.complaints.clear()
