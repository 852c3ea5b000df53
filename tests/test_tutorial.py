"""The tutorial: every command, in order, as printed, in a clone."""

import os
import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from model.tokenizer import Tokenizer

ROOT = Path(__file__).parents[1]
TUTORIAL = (ROOT / "docs/training/tutorial.md").read_text(encoding="utf-8")
INSTALL, *COMMANDS = re.findall(r"^```sh\n(.*?)^```", TUTORIAL, re.DOTALL | re.MULTILINE)
STEPS = "2"


def test_it_installs_by_a_target_of_the_makefile() -> None:
    command, activate = INSTALL.splitlines()
    assert re.search(r"^\$\(VENV\)/\.dev:", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    assert (command, activate) == ("make .venv/.dev", ". .venv/bin/activate")


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
def test_every_command_runs_as_printed(tmp_path: Path) -> None:
    shutil.copytree(ROOT / "samples", tmp_path / "samples")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = str(free.getsockname()[1])
    script = "\n".join(["set -e", *COMMANDS]).replace("127.0.0.1:8000", f"127.0.0.1:{port}")
    environment = {name: value for name, value in os.environ.items() if not name.startswith("DRORAE_")}
    environment |= {
        "STEPS": STEPS,
        "DRORAE_PORT": port,
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
    }
    result = subprocess.run(
        ["bash", "-c", script], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=900
    )
    assert result.returncode == 0, result.stderr[-3000:]
    assert Tokenizer.load(tmp_path / "runs/mine/phase3/checkpoint").fusion is not None
    assert (tmp_path / "runs/mine/report").is_dir()
    for name in ("bridge.png", "served.png"):
        with Image.open(tmp_path / name) as picture:
            assert picture.size == (256, 256)
