"""The process: its address, its signals, its exit status, what it prints."""

import os
import signal
import socket
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from model.tokenizer import Tokenizer
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


def test_a_signal_drains(
    applications: list[Any],
    gated: Any,
    png: bytes,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """SIGTERM in the middle of a request: it is answered, and the exit status is 0."""
    monkeypatch.setattr(Tokenizer, "load", lambda *_, **__: gated)
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    listening = threading.Event()
    draining = threading.Event()
    original_write = sys.stdout.write
    monkeypatch.setattr(sys.stdout, "write", lambda text: (original_write(text), listening.set())[0])

    def act() -> int:
        assert listening.wait(30)
        engine = applications[0].state.pipeline.engine
        start_draining = engine.start_draining
        engine.start_draining = lambda: (start_draining(), draining.set())
        assert engine.wait_until_settled(30)
        with ThreadPoolExecutor(1) as pool:
            answer = pool.submit(httpx.post, f"http://127.0.0.1:{port}/encode", content=png, timeout=30)
            assert gated.entered.acquire(timeout=30)
            os.kill(os.getpid(), signal.SIGTERM)
            assert draining.wait(30)
            gated.gate.set()
            return answer.result(30).status_code

    with ThreadPoolExecutor(1) as pool:
        answered = pool.submit(act)
        assert server.run(Settings(port=port)) == 0
        assert answered.result(30) == 200
    assert capfd.readouterr().out == f"DRoRAE mini on http://127.0.0.1:{port}\n"


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
        ("DRORAE_FUSION", "fast", "Input should be 'auto', 'triton', 'folded' or 'reference'"),
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
