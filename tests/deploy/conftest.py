"""Where the deployment's files are, and the real service as a process."""

from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest

from deploy.checks.context import BuildContext
from deploy.checks.replicas import replica, wait_for

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"


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


@pytest.fixture(scope="session")
def service(photo: bytes) -> Iterator[str]:
    """A replica that has done a little of everything; gives its address."""
    with replica() as running:
        running.wait_until_ready()
        url = running.url
        with httpx.Client(base_url=url, timeout=60) as client:
            for _ in range(3):
                latents = client.post("/encode", content=photo)
                assert latents.status_code == 200, latents.text
            assert client.post("/decode", content=latents.content).status_code == 200
            assert client.post("/reconstruct", content=photo).status_code == 200
            assert client.post("/encode", content=b"no picture").status_code in (400, 415, 422)
        yield url
