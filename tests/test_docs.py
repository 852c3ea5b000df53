"""The pages: their commands run as they stand, their links lead somewhere, generated ones are current."""

import os
import re
import runpy
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import unquote

import pytest
from PIL import Image

from cli.parser import build_parser

ROOT = Path(__file__).parents[1]
ADDRESS = "http://127.0.0.1:8000"
SERVED = ("README.md", "docs/serving/README.md")
"""Pages whose commands talk to a service on `ADDRESS`."""
COMMANDS = re.compile(r"```sh\n(.*?)```", re.DOTALL)
PYTHON = re.compile(r"```python\n(.*?)```", re.DOTALL)
FENCES = re.compile(r"```.*?```|`[^`\n]*`", re.DOTALL)
LINKS = re.compile(r"\]\(([^)\s]+)\)")
TARGETS = re.compile(r"(?:^|`|DRORAE_DATA=\.\.\. )make ([a-z]+)", re.MULTILINE)
CLIENT_ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT / "client")}
MAX_README_WORDS = 1200
MAX_FOLDER_ENTRIES = 14


def read(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


def pages() -> list[str]:
    """Every page of the repository, relative to its root."""
    found = [*ROOT.glob("*.md")]
    for folder in ("benchmarks", "client", "deploy", "docs", "samples"):
        found += (ROOT / folder).rglob("*.md")
    return sorted(str(page.relative_to(ROOT)) for page in found)


@pytest.fixture(scope="module")
def service() -> Iterator[str]:
    """``drorae serve`` on ``mini``, on a free port; gives its address."""
    command = [str(Path(sys.executable).with_name("drorae")), "serve", "--port", "0"]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("DRORAE_")}
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stdout is not None
        address = process.stdout.readline().split()[-1]
        wait = ["curl", "-s", "-o", "/dev/null", "--fail", "--retry", "60", "--retry-delay", "1"]
        subprocess.run([*wait, "--retry-all-errors", f"{address}/readyz"], check=True, timeout=120)
        yield address
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 0


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A working directory with the photos that the examples name."""
    shutil.copytree(ROOT / "samples", tmp_path / "samples")
    return tmp_path


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
@pytest.mark.parametrize("page", SERVED)
def test_curl_examples(service: str, folder: Path, page: str) -> None:
    lines = [line for line in read(page).splitlines() if line.startswith("curl ")]
    assert len(lines) >= 4
    for line in lines:
        command = line.replace(ADDRESS, service).replace("curl -s", "curl -sS --fail-with-body")
        result = subprocess.run(command, shell=True, cwd=folder, capture_output=True, timeout=60, check=False)
        assert result.returncode == 0, (line, result.stdout[:500], result.stderr)
    assert (folder / "latents.safetensors").stat().st_size > 0
    for name in {"decoded.png", "reconstructed.png"} & {word for line in lines for word in line.split()}:
        with Image.open(folder / name) as picture:
            assert picture.size == (256, 256)


@pytest.mark.slow
@pytest.mark.parametrize("page", [*SERVED, "docs/reference/python.md", "client/README.md"])
def test_python_examples(service: str, folder: Path, monkeypatch: pytest.MonkeyPatch, page: str) -> None:
    monkeypatch.chdir(folder)
    examples = PYTHON.findall(read(page))
    assert examples
    names: dict[str, object] = {}
    for example in examples:
        exec(compile(example.replace(ADDRESS, service), page, "exec"), names)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("page", "num", "result"), [("README.md", 4, "grid.png"), ("docs/tokenize.md", 3, "latents")]
)
def test_commands_on_files(folder: Path, page: str, num: int, result: str) -> None:
    lines = [line for block in COMMANDS.findall(read(page)) for line in block.splitlines()]
    commands = [line for line in lines if line.startswith("drorae ")]
    assert len(commands) == num
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    script = "\n".join(["set -e", *commands])
    subprocess.run(["bash", "-c", script], cwd=folder, env={**os.environ, "PATH": path}, check=True)
    assert (folder / result).exists()


@pytest.mark.slow
def test_the_clients_command_line(service: str, folder: Path) -> None:
    lines = [line for block in COMMANDS.findall(read("client/README.md")) for line in block.splitlines()]
    commands = [line.removeprefix("drorae-client ") for line in lines if line.startswith("drorae-client ")]
    assert len(commands) == 4
    for command in commands:
        program = [sys.executable, "-m", "drorae_client", *command.split(), "--url", service]
        subprocess.run(program, cwd=folder, env=CLIENT_ENVIRONMENT, check=True, timeout=120)
    assert {path.name for path in (folder / "out").iterdir()} == {
        f"{photo.stem}.png" for photo in (folder / "samples").glob("*.jpg")
    }


@pytest.mark.slow
@pytest.mark.parametrize(
    ("example", "arguments"),
    [
        ("numpy_folder.py", "samples latents.npy URL"),
        ("torch_dataset.py", "samples URL"),
        ("asyncio_pipeline.py", "--url URL samples/bridge.jpg samples/citrus.jpg"),
        ("beside_diffusers.py", "samples/citrus.jpg URL"),
    ],
)
def test_the_clients_examples(service: str, folder: Path, example: str, arguments: str) -> None:
    command = [sys.executable, str(ROOT / "client/examples" / example), *arguments.split()]
    command = [service if word == "URL" else word for word in command]
    done = subprocess.run(
        command,
        cwd=folder,
        env=CLIENT_ENVIRONMENT,
        check=True,
        timeout=120,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert "192" in done.stdout or ".jpg" in done.stdout or "True" in done.stdout


def test_the_readme_is_short() -> None:
    assert len(read("README.md").split()) <= MAX_README_WORDS


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
def test_make_knows_the_targets_that_pages_name() -> None:
    targets = {name for page in pages() for name in TARGETS.findall(read(page))}
    assert {"serve", "test", "quick"} <= targets
    command = ["make", "--dry-run", *sorted(targets)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("page", pages())
def test_links_lead_somewhere(page: str) -> None:
    for target in LINKS.findall(FENCES.sub("", read(page))):
        if "://" in target:
            continue
        path, _, anchor = unquote(target).partition("#")
        file = (ROOT / page).parent / path if path else ROOT / page
        assert file.exists(), f"{page}: {target}"
        if anchor:
            assert anchor in anchors(file.read_text(encoding="utf-8")), f"{page}: {target}"


def anchors(text: str) -> set[str]:
    """The anchors of a page's headings, as GitHub forms them."""
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_the_settings_page_is_current() -> None:
    page = runpy.run_path(str(ROOT / "docs/serving/settings.py"))["settings_page"]()
    assert read("docs/serving/settings.md") == page, "run: make docs"


def test_the_page_of_the_command_line_names_every_command() -> None:
    page = read("docs/reference/command-line.md")
    commands = next(action.choices for action in build_parser()._actions if action.dest == "command")
    assert commands
    assert [name for name in commands if f"| `drorae {name}` |" not in page] == []


def test_the_index_names_every_page() -> None:
    index = read("docs/README.md")
    for page in pages():
        if page.startswith("docs/") and page != "docs/README.md":
            assert page.removeprefix("docs/") in index, page


def test_folders_of_pages_are_small() -> None:
    for folder in (ROOT / "docs", *(path for path in (ROOT / "docs").rglob("*") if path.is_dir())):
        entries = [entry for entry in folder.iterdir() if not entry.name.startswith((".", "__"))]
        assert len(entries) <= MAX_FOLDER_ENTRIES, folder
