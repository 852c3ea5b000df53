"""The committed balancer configuration, run by a real HAProxy over real replicas that come and go."""

import itertools
import os
import re
import shutil
import signal
import socket
import subprocess
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from deploy.checks.names import NameServer
from service.settings import Settings

# Replicas differ in their address and share their port, as containers do.
ADDRESSES = ("127.0.0.2", "127.0.0.3")
NUM_CLIENTS = 3
READY_TIMEOUT_S = 90
REQUESTS_BETWEEN_EVENTS = 30


@pytest.fixture(scope="module")
def haproxy() -> str:
    found = shutil.which("haproxy") or shutil.which("haproxy", path="/usr/sbin")
    if found is None:
        pytest.skip("haproxy is not installed: apt-get install haproxy")
    return found


@pytest.fixture(scope="module")
def configuration(compose: Path) -> Path:
    return compose / "haproxy.cfg"


class Traffic:
    """Clients that send one request after the other until told to stop.

    Args:
        url: of the balancer.
        bodies: what is encoded, in turns.
    """

    def __init__(self, url: str, bodies: list[bytes]) -> None:
        self.answers: Counter[str] = Counter()
        self._url, self._bodies = url, bodies
        self._stopped = threading.Event()
        self._changed = threading.Condition()
        self._threads = [threading.Thread(target=self._send, args=(n,)) for n in range(NUM_CLIENTS)]

    def __enter__(self) -> "Traffic":
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopped.set()
        for thread in self._threads:
            thread.join(60)

    def wait_for_more(self, count: int = REQUESTS_BETWEEN_EVENTS) -> None:
        """Wait until so many further answers came."""
        with self._changed:
            wanted = self.answers.total() + count
            assert self._changed.wait_for(lambda: self.answers.total() >= wanted, 60), self.answers

    def _send(self, number: int) -> None:
        bodies = itertools.cycle(self._bodies[number:] + self._bodies[:number])
        with httpx.Client(base_url=self._url, timeout=60) as client:
            while not self._stopped.is_set():
                try:
                    response = client.post("/encode", content=next(bodies))
                    outcome = f"{response.status_code} {response.text if response.is_error else ''}".strip()
                except httpx.TransportError as exc:
                    outcome = repr(exc)
                with self._changed:
                    self.answers[outcome] += 1
                    self._changed.notify_all()


@contextmanager
def balancer(program: str, configuration: Path, port: int, names: NameServer) -> Iterator[tuple[str, str]]:
    """HAProxy in front of ``replicas:port``; gives its own address and that of its observation."""
    front, observation = free_port(), free_port()
    environment = {
        "DRORAE_BIND": f"127.0.0.1:{front}",
        "DRORAE_METRICS_BIND": f"127.0.0.1:{observation}",
        "DRORAE_BACKEND": f"drorae:{port}",
        "DRORAE_DNS": names.endpoint,
    }
    process = subprocess.Popen(
        [program, "-db", "-f", str(configuration)],
        env={**os.environ, **environment},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        yield f"http://127.0.0.1:{front}", f"http://127.0.0.1:{observation}"
    finally:
        process.send_signal(signal.SIGUSR1)  # as the image's STOPSIGNAL
        assert process.wait(60) == 0


def num_up(observation: str) -> int:
    """Replicas that the balancer sends requests to."""
    try:
        text = httpx.get(f"{observation}/metrics", params={"scope": "server"}).text
    except httpx.TransportError:
        return 0
    return len(
        re.findall(r'haproxy_server_status\{proxy="replicas",server="\w+",state="UP"\} 1$', text, re.M)
    )


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return int(probe.getsockname()[1])


def test_the_configuration_is_valid(haproxy: str, configuration: Path) -> None:
    command = [haproxy, "-c", "-f", str(configuration)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert "WARNING" not in result.stderr


def test_it_waits_longer_than_the_service(configuration: Path) -> None:
    text = configuration.read_text(encoding="utf-8")
    bounds = {
        kind: int(value) for kind, value in re.findall(r"^ +timeout (client|server) +(\d+)s .*", text, re.M)
    }
    longest_s = Settings.model_fields["max_request_timeout_s"].default
    assert min(bounds.values()) > longest_s
    per_replica = re.search(r"\bmaxconn (\d+) maxqueue", text)
    assert per_replica is not None
    assert int(per_replica[1]) > Settings.model_fields["queue_limit_items"].default


def test_without_replicas_it_answers_as_the_service_would(
    haproxy: str, configuration: Path, wait: Any
) -> None:
    with NameServer([]) as names, balancer(haproxy, configuration, 1, names) as (url, observation):
        wait("balancer", lambda: listens(f"{observation}/healthz"))
        response = httpx.post(f"{url}/encode", content=b"x")
    problem = response.json()
    assert response.status_code == problem["status"] == 503
    assert response.headers["content-type"] == "application/problem+json"
    assert int(response.headers["retry-after"]) >= 1
    assert set(problem) == {"type", "title", "status", "detail", "request_id"}


def listens(url: str) -> bool:
    try:
        return httpx.get(url).is_success
    except httpx.TransportError:
        return False


@pytest.mark.slow
def test_a_rolling_restart_fails_no_request(
    haproxy: str, configuration: Path, root: Path, start: Callable[..., Any], wait: Any, answered: Any
) -> None:
    """Each replica in turn is told SIGTERM under a trickle of requests, and replaced: all answers are 200."""
    port = free_port()
    bodies = [file.read_bytes() for file in sorted((root / "samples").glob("*.jpg"))]
    (buffer_bytes,) = re.findall(r"tune.bufsize (\d+)", configuration.read_text(encoding="utf-8"))
    assert max(map(len, bodies)) < int(buffer_bytes)  # else they would not be sent again
    with ExitStack() as stack:
        names = stack.enter_context(NameServer(list(ADDRESSES)))
        replicas, urls = [], []
        for address in ADDRESSES:
            process, url = stack.enter_context(start(address, port, DRORAE_CPU_WORKERS="1"))
            replicas.append(process)
            urls.append(url)
        wait("replicas", lambda: all(answered(f"{url}/readyz") for url in urls), READY_TIMEOUT_S)
        url, observation = stack.enter_context(balancer(haproxy, configuration, port, names))
        wait("two replicas", lambda: num_up(observation) == len(ADDRESSES))
        with Traffic(url, bodies) as traffic:
            for address, process in zip(ADDRESSES, replicas, strict=True):
                traffic.wait_for_more()
                process.send_signal(signal.SIGTERM)
                assert process.wait(60) == 0
                traffic.wait_for_more()
                wait("one replica", lambda: num_up(observation) == 1)
                stack.enter_context(start(address, port, DRORAE_CPU_WORKERS="1"))
                wait("two replicas", lambda: num_up(observation) == len(ADDRESSES), READY_TIMEOUT_S)
            traffic.wait_for_more()
    assert set(traffic.answers) == {"200"}, traffic.answers
