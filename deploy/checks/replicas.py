"""Real replicas of the service and a real HAProxy before them, for checks without containers.

Replicas differ in their address and share their port, as containers do; addresses are of the loopback range.
"""

import http.client
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from deploy.checks.names import NameServer

ROOT = Path(__file__).parents[2]
CONFIGURATION = ROOT / "deploy/compose/haproxy.cfg"
READY_TIMEOUT_S = 180
STOP_TIMEOUT_S = 60
_UP = re.compile(r'^haproxy_server_status\{proxy="replicas",server="\w+",state="UP"\} 1$', re.MULTILINE)


class CheckError(Exception):
    """A check found something that must not be."""


class Replica(NamedTuple):
    """A running process of the service and where it listens."""

    process: subprocess.Popen[str]
    host: str
    port: int

    @property
    def url(self) -> str:
        """Its address."""
        return f"http://{self.host}:{self.port}"

    def wait_until_ready(self) -> None:
        """Wait for its /readyz.

        Raises:
            CheckError: it ends, or does not become ready.
        """

        def is_ready() -> bool:
            if self.process.poll() is not None:
                raise CheckError(f"{self.url} ended with status {self.process.returncode}")
            return status_of(self.host, self.port) == 200

        wait_for(f"{self.url} is ready", is_ready, READY_TIMEOUT_S)

    def stop(self) -> None:
        """SIGTERM, and wait for the end.

        Raises:
            CheckError: it does not end, or not with status 0.
        """
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        try:
            status = self.process.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired as exc:
            self.process.kill()
            raise CheckError(f"{self.url} did not end within {STOP_TIMEOUT_S} s") from exc
        if status != 0:
            raise CheckError(f"{self.url} ended with status {status}")


@contextmanager
def replica(host: str = "127.0.0.1", port: int = 0, **settings: str) -> Iterator[Replica]:
    """``python -m service`` on the bundled checkpoint, stopped at the end.

    Args:
        host: to listen on.
        port: to listen on; 0 takes a free one.
        settings: further ``DRORAE_*`` variables.
    """
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
        assert process.stdout is not None
        address = process.stdout.readline().rpartition(":")[2].strip()
        running = Replica(process, host, int(address or 0))
        try:
            if not address:
                raise CheckError(f"the service on {host} ended before it listened")
            yield running
        finally:
            running.stop()


class Balancer(NamedTuple):
    """A running HAProxy: the port of its service, and that of its observation."""

    port: int
    observation_port: int

    def num_up(self) -> int:
        """Replicas that it sends requests to."""
        _, text = get("127.0.0.1", self.observation_port, "/metrics?scope=server")
        return len(_UP.findall(text))


def find_haproxy() -> str | None:
    """The program, where it is installed."""
    return shutil.which("haproxy") or shutil.which("haproxy", path="/usr/sbin")


@contextmanager
def balancer(program: str, port: int, names: NameServer) -> Iterator[Balancer]:
    """HAProxy with the committed configuration, in front of the replicas on ``port`` that ``names`` names.

    Raises:
        CheckError: it does not end with status 0.
    """
    running = Balancer(free_port(), free_port())
    environment = {
        "DRORAE_BIND": f"127.0.0.1:{running.port}",
        "DRORAE_METRICS_BIND": f"127.0.0.1:{running.observation_port}",
        "DRORAE_BACKEND": f"drorae:{port}",
        "DRORAE_DNS": names.endpoint,
    }
    process = subprocess.Popen(
        [program, "-db", "-f", str(CONFIGURATION)],
        env={**os.environ, **environment},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        yield running
    finally:
        process.send_signal(signal.SIGUSR1)  # as the image's STOPSIGNAL
        status = process.wait(STOP_TIMEOUT_S)
    if status != 0:
        raise CheckError(f"HAProxy ended with status {status}")


def get(host: str, port: int, path: str) -> tuple[int, str]:
    """Status and text of a GET; 0 where nothing answers."""
    connection = http.client.HTTPConnection(host, port, timeout=5)
    try:
        connection.request("GET", path)
        answer = connection.getresponse()
        return answer.status, answer.read().decode(errors="replace")
    except (OSError, http.client.HTTPException):
        return 0, ""
    finally:
        connection.close()


def status_of(host: str, port: int, path: str = "/readyz") -> int:
    """The status of a GET; 0 where nothing answers."""
    return get(host, port, path)[0]


def wait_for(what: str, condition: Callable[[], bool], timeout_s: float = 60) -> None:
    """Ask a foreign process again and again; it has no other way to tell.

    Raises:
        CheckError: not within the time.
    """
    deadline_s = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline_s:
            raise CheckError(f"{what}: not within {timeout_s:g} s")
        time.sleep(0.05)


def free_port() -> int:
    """A port that nothing listens on."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return int(probe.getsockname()[1])
