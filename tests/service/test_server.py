"""The process: its address, its signals, its exit status, what it prints."""

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx
import pytest

from service import server
from service.app import create_app
from service.settings import Settings

ROOT = Path(__file__).parents[2]


@pytest.fixture
def applications(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The applications that `server.run` builds."""
    built: list[Any] = []

    def build(*args: Any, **kwargs: Any) -> Any:
        built.append(create_app(*args, **kwargs))
        return built[-1]

    monkeypatch.setattr(server, "create_app", build)
    return built


def test_busy_port(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert server.run(Settings(port=port)) == server.EXIT_ADDRESS == 1
    captured = capsys.readouterr()
    assert captured.err == f"drorae: cannot listen on 127.0.0.1:{port}: Address already in use\n"
    assert captured.out == ""


def test_unknown_host(capsys: pytest.CaptureFixture[str]) -> None:
    assert server.run(Settings(host="256.0.0.1", port=0)) == server.EXIT_ADDRESS
    assert capsys.readouterr().err.startswith("drorae: cannot listen on 256.0.0.1:0: ")


def test_connections_send_small_writes_at_once() -> None:
    with server.listen("127.0.0.1", 0) as listener, socket.create_connection(listener.getsockname()):
        connection, _ = listener.accept()
        with connection:
            assert connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)


def test_broken_checkpoint(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{")
    assert server.run(Settings(port=0, checkpoint=str(tmp_path))) == server.EXIT_MODEL == 2
    error = capsys.readouterr().err
    assert error.startswith(f"drorae: {tmp_path}")
    assert "config.json" in error
    assert error.count("\n") == 1


def test_a_fusion_that_cannot_run(
    capsys: pytest.CaptureFixture[str], checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    settings = Settings(port=0, checkpoint=str(checkpoint), device="cpu", fusion="triton")
    assert server.run(settings) == server.EXIT_MODEL
    assert capsys.readouterr().err.startswith("drorae: fusion=triton cannot run: ")


class Running:
    """`server.run` in this process's main thread, with a second thread that acts upon it."""

    def __init__(self, applications: list[Any], gated: Any, act: Callable[["Running"], Any]) -> None:
        self._applications = applications
        self._act = act
        self.gated = gated
        with socket.create_server(("127.0.0.1", 0)) as probe:
            self.port = probe.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"

    @property
    def engine(self) -> Any:
        return self._applications[0].state.parts.engine

    def serve(self, **settings: Any) -> tuple[int, Any]:
        """The exit status, and what the acting thread returned."""
        listening = threading.Event()
        with ThreadPoolExecutor(1) as pool, pytest.MonkeyPatch.context() as patch:
            write = sys.stdout.write
            patch.setattr(sys.stdout, "write", lambda text: (write(text), listening.set())[0])

            def act() -> Any:
                assert listening.wait(30)
                try:
                    assert self.engine.wait_until_settled(30)
                    self.gated.arm()
                    return self._act(self)
                except BaseException:  # the service must end for the test to fail
                    os.kill(os.getpid(), signal.SIGTERM)
                    raise

            acted = pool.submit(act)
            status = server.run(
                Settings(port=self.port, cpu_workers=1, **settings), load=lambda _: self.gated
            )
            return status, acted.result(30)


def test_a_signal_drains(
    applications: list[Any], gated: Any, png: bytes, capfd: pytest.CaptureFixture[str]
) -> None:
    """SIGTERM in the middle of a request: unready, new work refused, the request answered, status 0."""

    def act(running: Running) -> tuple[int, int, int, str]:
        with ThreadPoolExecutor(1) as pool, httpx.Client(base_url=running.url, timeout=30) as client:
            answer = pool.submit(httpx.post, f"{running.url}/encode", content=png, timeout=30)
            assert gated.entered.acquire(timeout=30)
            os.kill(os.getpid(), signal.SIGTERM)
            while (ready := client.get("/readyz")).status_code == 200:
                pass
            refused = client.post("/encode", content=png)
            gated.gate.set()
            return answer.result(30).status_code, ready.status_code, refused.status_code, refused.text

    running = Running(applications, gated, act)
    status, (answered, ready, refused, text) = running.serve()
    assert (status, answered, ready, refused) == (0, 200, 503, 503)
    assert "draining" in text
    assert capfd.readouterr().out == f"DRoRAE mini on {running.url}\n"


def test_what_outlasts_the_drain_is_told_so(applications: list[Any], gated: Any, png: bytes) -> None:
    def act(running: Running) -> httpx.Response:
        with ThreadPoolExecutor(1) as pool:
            answer = pool.submit(httpx.post, f"{running.url}/encode", content=png, timeout=30)
            assert gated.entered.acquire(timeout=30)
            os.kill(os.getpid(), signal.SIGTERM)
            response = answer.result(30)
            gated.gate.set()
            return response

    status, response = Running(applications, gated, act).serve(drain_timeout_s=0.2)
    assert status == 0
    assert response.status_code == 503
    assert "stopped before this was done" in response.json()["detail"]


def test_the_drain_ends_under_every_client(
    applications: list[Any], gated: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """Uploads get 503 at its deadline; what cannot be answered any more is closed."""
    upload = b"POST /encode HTTP/1.1\r\nHost: x\r\nContent-Length: 100000\r\n\r\n"
    latents = bytes(64 * 32 * 8 * 8 * 2)
    query = b"dtype=float16&shape=64&shape=32&shape=8&shape=8&format=raw&output_dtype=float32"
    decode = b"POST /decode?%s HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % (query, len(latents))

    def act(running: Running) -> tuple[list[bytes], float]:
        with ExitStack() as stack:
            clients = [
                stack.enter_context(socket.create_connection(("127.0.0.1", running.port), timeout=30))
                for _ in range(5)
            ]
            silent, trickling, half, reader, _ = clients
            reader.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            silent.sendall(upload)
            trickling.sendall(upload + b"abc")
            half.sendall(b"GET /livez HT")
            reader.sendall((decode + latents) * 5)
            parts = applications[0].state.parts
            held_bytes = parts.metrics.registry.get_sample_value
            deadline_s = time.monotonic() + 30
            while (
                parts.admission.num_requests < 3 or held_bytes("drorae_pending_bytes") < 64 * 3 * 64 * 64 * 4
            ):
                assert time.monotonic() < deadline_s
            os.kill(os.getpid(), signal.SIGTERM)
            began_s = time.monotonic()
            answers = []
            for client in (silent, trickling):
                answer = b""
                while chunk := client.recv(65536):
                    answer += chunk
                answers.append(answer)
            return answers, began_s

    status, (answers, began_s) = Running(applications, gated, act).serve(drain_timeout_s=0.5)
    assert time.monotonic() - began_s < 10
    assert status == 0
    for answer in answers:
        assert answer.startswith(b"HTTP/1.1 503")
        assert b"application/problem+json" in answer
        assert b"retry-after: " in answer
    assert not [entry for entry in caplog.records if entry.exc_info]


def test_a_hung_engine_ends_the_service(
    applications: list[Any], gated: Any, png: bytes, capfd: pytest.CaptureFixture[str]
) -> None:
    """No signal is needed: accepted requests get 503, and the exit status is 3."""

    def act(running: Running) -> list[int]:
        with ThreadPoolExecutor(2) as pool:
            answers = [
                pool.submit(httpx.post, f"{running.url}/encode", content=png, timeout=30) for _ in range(2)
            ]
            return [answer.result(30).status_code for answer in answers]

    status, answered = Running(applications, gated, act).serve(hang_timeout_s=1.0, batch_size=1)
    assert status == server.EXIT_ENGINE == 3
    assert answered == [503, 503]
    assert "drorae: the engine failed: drorae-cpu:0 has been busy" in capfd.readouterr().err


def test_a_stuck_process_leaves_at_once() -> None:
    script = (
        "import threading, service.server as s\n"
        "threading.Thread(target=threading.Event().wait).start()\n"
        "s.leave_if_stuck(s.EXIT_ENGINE)"
    )
    finished = subprocess.run([sys.executable, "-c", script], cwd=ROOT, timeout=60, check=False)
    assert finished.returncode == 3


def test_process(checkpoint: Path, png: bytes) -> None:
    """The real thing: started from the environment, on a free port, ended by SIGTERM."""
    environment = {
        **os.environ,
        "DRORAE_CHECKPOINT": str(checkpoint),
        "DRORAE_PORT": "0",
        "DRORAE_CHEKPOINT": "x",
        "OMP_NUM_THREADS": "1",
    }
    with subprocess.Popen(
        [sys.executable, "-m", "service"],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        url = process.stdout.readline().split(" on ")[1].strip()
        transport = httpx.HTTPTransport(retries=3)
        with httpx.Client(base_url=url, transport=transport, timeout=30) as client:
            assert client.get("/livez").status_code == 200
            assert client.post("/encode", content=png).status_code in (200, 503)
        process.send_signal(signal.SIGTERM)
        _, errors = process.communicate(timeout=30)
    assert process.returncode == 0, errors
    assert "DRORAE_CHEKPOINT names no setting" in errors
    assert "Traceback" not in errors


@pytest.mark.parametrize(
    ("variable", "value", "message"),
    [
        ("DRORAE_PORT", "http", "Input should be a valid integer"),
        ("DRORAE_FUSION", "fast", "Input should be 'auto', 'triton'"),
        ("DRORAE_BATCH_BUCKETS", "1,x", "Input should be a valid integer"),
    ],
)
def test_impossible_settings_are_one_sentence(variable: str, value: str, message: str) -> None:
    finished = subprocess.run(
        [sys.executable, "-m", "service"],
        cwd=ROOT,
        env={**os.environ, variable: value},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert finished.returncode == 2
    assert finished.stderr.startswith(f"drorae: {variable}: {message}")
    assert finished.stderr.count("\n") == 1


def test_unusable_keys_are_one_sentence() -> None:
    finished = subprocess.run(
        [sys.executable, "-m", "service"],
        cwd=ROOT,
        env={**os.environ, "DRORAE_API_KEYS": "short", "DRORAE_PORT": "0"},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert finished.returncode == 2
    assert finished.stderr == "drorae: DRORAE_API_KEYS: key 1 has fewer than 16 characters\n"
