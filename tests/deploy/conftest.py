"""Where the deployment's files are, and the real service as a process."""

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from deploy.checks.context import BuildContext

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
READY_TIMEOUT_S = 90


@pytest.fixture(scope="session")
def root() -> Path:
    return ROOT


@pytest.fixture(scope="session")
def deploy() -> Path:
    return DEPLOY


@pytest.fixture(scope="session")
def compose() -> Path:
    """The compose files, and those that they mount."""
    return DEPLOY / "compose"


@pytest.fixture(scope="session")
def monitoring() -> Path:
    """Rules and dashboard."""
    return DEPLOY / "monitoring"


@pytest.fixture(scope="session")
def context() -> BuildContext:
    """The files that an image's build sees."""
    return BuildContext(ROOT)


@pytest.fixture(scope="session")
def photo() -> bytes:
    return (ROOT / "samples/honeybee.jpg").read_bytes()


def wait_for(what: str, condition: Callable[[], bool], timeout_s: float = 30) -> None:
    """Ask a foreign process again and again; it has no other way to tell."""
    deadline_s = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline_s, f"{what}: not within {timeout_s} s"
        time.sleep(0.05)


@pytest.fixture(scope="session")
def wait() -> Callable[..., None]:
    return wait_for


def answers(url: str, status: int = 200) -> bool:
    """Whether a GET is answered with a status."""
    try:
        return httpx.get(url, timeout=2).status_code == status
    except httpx.TransportError:
        return False


@pytest.fixture(scope="session")
def answered() -> Callable[..., bool]:
    return answers


@contextmanager
def started(host: str = "127.0.0.1", port: int = 0, **settings: str) -> Iterator[tuple[Any, str]]:
    """``python -m service`` on the bundled checkpoint; gives the process and its address."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("DRORAE_")}
    own = {
        "DRORAE_HOST": host,
        "DRORAE_PORT": str(port),
        "DRORAE_DEVICE": "cpu",
        "DRORAE_BATCH_SIZE": "2",  # few sizes to warm
        "DRORAE_HANG_TIMEOUT_S": "120",  # several replicas share a machine that may be busy
        "OMP_NUM_THREADS": "1",
    }
    with subprocess.Popen(
        [sys.executable, "-m", "service"],
        cwd=ROOT,
        env={**environment, **own, **settings},
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            assert process.stdout is not None
            url = process.stdout.readline().split(" on ")[1].strip()
            yield process, url
        finally:
            if process.poll() is None:
                process.terminate()
            assert process.wait(60) == 0


@pytest.fixture(scope="session")
def start() -> Callable[..., Any]:
    return started


@pytest.fixture(scope="session")
def service(photo: bytes) -> Iterator[str]:
    """A replica that has done a little of everything; gives its address."""
    with started() as (_, url):
        wait_for("ready", lambda: answers(f"{url}/readyz"), READY_TIMEOUT_S)
        with httpx.Client(base_url=url, timeout=60) as client:
            for _ in range(3):
                latents = client.post("/encode", content=photo)
                assert latents.status_code == 200, latents.text
            assert client.post("/decode", content=latents.content).status_code == 200
            assert client.post("/reconstruct", content=photo).status_code == 200
            assert client.post("/encode", content=b"no picture").status_code in (400, 415, 422)
        yield url
