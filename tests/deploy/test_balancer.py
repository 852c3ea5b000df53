"""The committed balancer configuration, run by a real HAProxy over real replicas that come and go."""

import re
import subprocess
from pathlib import Path

import httpx
import pytest

from deploy.checks.names import NameServer
from deploy.checks.replicas import CONFIGURATION, balancer, find_haproxy, status_of, wait_for
from deploy.checks.rolling_update import NEEDS_HAPROXY, update
from service.settings import Settings
from tests.service.conftest import checkpoint  # noqa: F401

NUM_REQUESTS = 200


@pytest.fixture(scope="module")
def haproxy() -> str:
    found = find_haproxy()
    if found is None:
        pytest.skip(NEEDS_HAPROXY)
    return found


@pytest.fixture(scope="module")
def configuration() -> str:
    return CONFIGURATION.read_text(encoding="utf-8")


def test_the_configuration_is_valid(haproxy: str) -> None:
    command = [haproxy, "-c", "-f", str(CONFIGURATION)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert "WARNING" not in result.stderr


def test_it_waits_longer_than_the_service(configuration: str) -> None:
    bounds = {
        kind: int(value)
        for kind, value in re.findall(r"^ +timeout (client|server) +(\d+)s .*", configuration, re.M)
    }
    longest_s = Settings.model_fields["max_request_timeout_s"].default
    assert min(bounds.values()) > longest_s
    per_replica = re.search(r"\bmaxconn (\d+) maxqueue", configuration)
    assert per_replica is not None
    assert int(per_replica[1]) > Settings.model_fields["queue_limit_items"].default


def test_without_replicas_it_answers_as_the_service_would(haproxy: str) -> None:
    with NameServer([]) as names, balancer(haproxy, 1, names) as running:
        wait_for("balancer", lambda: status_of("127.0.0.1", running.observation_port, "/healthz") == 200)
        response = httpx.post(f"http://127.0.0.1:{running.port}/encode", content=b"x")
    problem = response.json()
    assert response.status_code == problem["status"] == 503
    assert response.headers["content-type"] == "application/problem+json"
    assert int(response.headers["retry-after"]) >= 1
    assert set(problem) == {"type", "title", "status", "detail", "request_id"}


@pytest.mark.slow
def test_a_rolling_update_loses_no_request(
    haproxy: str,
    root: Path,
    configuration: str,
    checkpoint: Path,  # noqa: F811
) -> None:
    """Every replica is replaced under load, without a moment between its last mention and its SIGTERM.

    `python -m deploy.checks.rolling_update` is the same with 10,000 requests.
    """
    (buffer_bytes,) = re.findall(r"tune.bufsize (\d+)", configuration)
    photos = [file.stat().st_size for file in (root / "samples").glob("*.jpg")]
    assert max(photos) < int(buffer_bytes)  # else they would not be sent again
    settings = {"DRORAE_CPU_WORKERS": "1", "DRORAE_CHECKPOINT": str(checkpoint)}
    result = update(haproxy, NUM_REQUESTS, in_flight=3, num_replicas=2, pre_stop_s=0, settings=settings)
    assert result.lost == {}
    assert result.num_replaced == 2
    assert result.answered >= NUM_REQUESTS
