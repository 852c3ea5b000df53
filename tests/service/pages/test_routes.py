"""The pages over HTTP: who gets which, by what policy, and that nothing else can be read through them."""

import gzip
import re
import shutil
import subprocess
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from model.tokenizer import Tokenizer
from service.app import create_app
from service.settings import Settings

Check = Callable[..., dict[str, Any]]
ROOT = Path(__file__).parents[3]
PAGES = ROOT / "service/pages"
BROWSER = {"Accept": "text/html,application/xhtml+xml,application/xml;q=0.9,image/webp,*/*;q=0.8"}
KEY = "0123456789abcdef"


def test_browsers_get_the_page_and_others_lines_for_curl(client: httpx.Client) -> None:
    page = client.get("/", headers=BROWSER)
    assert page.headers["content-type"] == "text/html; charset=utf-8"
    assert "<!DOCTYPE html>" in page.text
    for accept in ("*/*", "text/plain", ""):
        text = client.get("/", headers={"Accept": accept})
        assert text.headers["content-type"] == "text/plain; charset=utf-8"
        assert text.headers["vary"] == page.headers["vary"] == "Accept"
        assert f"{client.base_url}".rstrip("/") + "/encode" in text.text
    assert client.head("/").status_code == 200


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
def test_the_lines_for_curl_run(client: httpx.Client, png: bytes, tmp_path: Path) -> None:
    (tmp_path / "photo.jpg").write_bytes(png)
    lines = [line for line in client.get("/").text.splitlines() if line.startswith("  curl ")]
    assert len(lines) == 5
    for line in lines:
        command = line.replace("curl -s", "curl -sS --fail-with-body")
        subprocess.run(command, shell=True, cwd=tmp_path, check=True, capture_output=True, timeout=60)
    assert {file.name for file in tmp_path.iterdir()} == {
        *("photo.jpg", "latents.safetensors", "decoded.png", "reconstructed.png")
    }


@pytest.mark.parametrize(("path", "folder"), [("/page/", "site"), ("/docs/", "docs")])
def test_every_file_comes_under_a_policy(client: httpx.Client, path: str, folder: str) -> None:
    files = [file for file in (PAGES / folder).rglob("*") if file.is_file()]
    assert len(files) > 5
    for file in files:
        answer = client.get(path + str(file.relative_to(PAGES / folder)))
        content = file.read_bytes()
        assert answer.content == (gzip.decompress(content) if file.suffix == ".gz" else content), file
        policy = answer.headers["content-security-policy"]
        assert policy.startswith("default-src 'none'; script-src 'self'; style-src 'self';")
        assert "unsafe" not in policy
        again = client.get(answer.url, headers={"If-None-Match": answer.headers["etag"]})
        assert again.status_code == 304
    scripts = [file for file in files if file.name.endswith((".js", ".js.gz"))]
    assert scripts
    for file in scripts:
        media_type = client.get(path + str(file.relative_to(PAGES / folder))).headers["content-type"]
        assert media_type.startswith("text/javascript"), "browsers refuse modules of another type"


def test_pages_have_no_inline_code_and_no_other_host() -> None:
    for file in [*PAGES.rglob("*.html"), *PAGES.rglob("*.js"), *PAGES.rglob("*.css")]:
        text = file.read_text(encoding="utf-8")
        assert not re.search(r"""(https?:)?//(?!www\.w3\.org)[\w-]+\.\w""", re.sub(r"// .*", "", text)), file
        if file.suffix == ".html":
            assert not re.search(r"\s(style|on\w+)=|<style|<script(?![^>]* src=)", text), file


def test_files_of_the_site_are_small() -> None:
    own = [*PAGES.rglob("*.html"), *PAGES.rglob("*.js"), *PAGES.rglob("*.css")]
    assert [file for file in own if len(file.read_text(encoding="utf-8").splitlines()) > 399] == []


@pytest.mark.parametrize("path", ["/page/../routes.py", "/docs/%2e%2e/routes.py", "/page/..%2f..%2fapp.py"])
def test_nothing_beside_the_folders_is_read(client: httpx.Client, check_problem: Check, path: str) -> None:
    request = client.build_request("GET", "/")
    request.url = request.url.copy_with(raw_path=path.encode())
    check_problem(client.send(request), 404, "not-found")


@pytest.fixture(scope="module")
def closed(serve: Any, tokenizer: Tokenizer) -> Iterator[httpx.Client]:
    """A service with keys and without the page."""
    with serve(create_app(Settings(api_keys=KEY, page="off", batch_size=1), tokenizer)) as running:
        yield running.client


def test_without_the_page_browsers_get_the_lines(closed: httpx.Client, check_problem: Check) -> None:
    assert closed.get("/", headers=BROWSER).headers["content-type"] == "text/plain; charset=utf-8"
    check_problem(closed.get("/page/icon.svg", headers={"Authorization": f"Bearer {KEY}"}), 404, "not-found")


def test_pages_need_no_key_and_lead_nowhere_without_one(closed: httpx.Client, check_problem: Check) -> None:
    for path in ("/", "/docs", "/docs/drorae.js"):
        assert closed.get(path).status_code == 200
    for method, path in (("GET", "/openapi.json"), ("GET", "/page/../metrics"), ("POST", "/docs/x")):
        request = closed.build_request(method, "/")
        request.url = request.url.copy_with(raw_path=path.encode())
        assert closed.send(request).status_code in (401, 404)
    check_problem(closed.post("/docs"), 401, "unauthorized")


def test_a_wheel_holds_the_files() -> None:
    patterns = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]
    packed = {file for pattern in patterns["service"] for file in (ROOT / "service").glob(pattern)}
    files = {file for name in ("site", "docs") for file in (PAGES / name).rglob("*") if file.is_file()}
    assert files <= packed
