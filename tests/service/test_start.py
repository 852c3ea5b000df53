"""The start of a real process: SIGTERM at any moment of it, and devices that hang in it."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

# Serves, with a fault at one moment of the start: a SIGTERM then, or a hang for good.
SCRIPT = """
import os, signal, sys, threading
from service.processes.startup import prepare
prepare()
from service.engine import engine
from service import server
from service.settings import Settings

moment, fault, checkpoint = sys.argv[1:]

def at(name):
    if name == moment and fault in ("signal", "signal and hang"):
        os.kill(os.getpid(), signal.SIGTERM)
    if name == moment and fault in ("hang", "signal and hang"):
        threading.Event().wait()

def announced(name, function):
    def call(*args, **kwargs):
        at(name)
        return function(*args, **kwargs)
    return call

server.listen = announced("listen", server.listen)
server.create_app = announced("app", server.create_app)
server._set_aside = announced("ready", server._set_aside)
engine.CpuRunner.warm = announced("warm", engine.CpuRunner.warm)
limit_s = 1 if fault == "hang" else 300
settings = Settings(checkpoint=checkpoint, port=0, num_decoders=1, start_timeout_s=limit_s)
status = server.run(settings, announced("load", server.load_tokenizer))
server.leave_if_stuck(status)
sys.exit(status)
"""


def run_script(moment: str, fault: str, checkpoint: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", SCRIPT, moment, fault, str(checkpoint)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)


@pytest.mark.parametrize(
    ("moment", "fault"),
    [
        ("listen", "signal"),
        ("app", "signal"),
        ("load", "signal"),
        ("load", "signal and hang"),
        ("warm", "signal"),
        ("warm", "signal and hang"),
        ("ready", "signal"),
    ],
)
def test_a_signal_at_any_moment_of_the_start_ends_with_0(checkpoint: Path, moment: str, fault: str) -> None:
    finished = run_script(moment, fault, checkpoint)
    assert finished.returncode == 0, finished.stderr
    assert "Traceback" not in finished.stderr


@pytest.mark.parametrize("moment", ["load", "warm"])
def test_a_device_that_hangs_at_the_start_ends_with_3(checkpoint: Path, moment: str) -> None:
    finished = run_script(moment, "hang", checkpoint)
    assert finished.returncode == 3, finished.stderr
    assert finished.stderr.splitlines()[-1].startswith("drorae: the engine failed: ")
    assert "start_timeout_s=1" in finished.stderr


@pytest.mark.parametrize("module", [["service"], ["cli.main", "serve"]], ids=["service", "drorae serve"])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_while_pytorch_is_imported_ends_with_0(module: list[str], number: int) -> None:
    command, environment = [sys.executable, "-m", *module], {**os.environ, "DRORAE_PORT": "0"}
    with subprocess.Popen(command, cwd=ROOT, env=environment, stderr=subprocess.PIPE) as process:
        folder = Path("/proc") / str(process.pid)
        while not (catches_sigterm(folder) or "libtorch" in (folder / "maps").read_text()):
            assert process.poll() is None
        process.send_signal(number)
        _, errors = process.communicate(timeout=120)
    assert (process.returncode, errors) == (0, b"")


def catches_sigterm(folder: Path) -> bool:
    lines = (folder / "status").read_text().splitlines()
    caught = next(int(line.split()[1], 16) for line in lines if line.startswith("SigCgt"))
    return bool(caught & 1 << (signal.SIGTERM - 1))
