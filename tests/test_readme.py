"""The README's commands, run as they stand against the service that its first command starts."""

import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
ADDRESS = "http://127.0.0.1:8000"
CURL = [line for line in README.splitlines() if line.startswith("curl ")]
PYTHON = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


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
    """A working directory with the photos that the README's examples name."""
    shutil.copytree(ROOT / "samples", tmp_path / "samples")
    return tmp_path


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
def test_curl_examples(service: str, folder: Path) -> None:
    assert len(CURL) >= 5
    for line in CURL:
        command = line.replace(ADDRESS, service).replace("curl -s", "curl -sS --fail-with-body")
        result = subprocess.run(command, shell=True, cwd=folder, capture_output=True, timeout=60, check=False)
        assert result.returncode == 0, (line, result.stdout[:500], result.stderr)
    for name in ("decoded.png", "reconstructed.png"):
        with Image.open(folder / name) as picture:
            assert picture.size == (256, 256)


def test_python_examples(service: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    assert len(PYTHON) >= 3
    names: dict[str, object] = {}
    for example in PYTHON:
        exec(compile(example.replace(ADDRESS, service), "README.md", "exec"), names)
