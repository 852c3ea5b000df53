"""The first minutes on a GPU, with a Python, an ncu and an nvidia-smi that only write down their calls."""

import csv
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks import fusion, tokenizer
from benchmarks.harness.provenance import ROOT

SCRIPT = ROOT / "benchmarks" / "gpu_minutes.sh"
STEPS = ["first", "tests", "fusion", "alone", "tokenizer", "float32", "compiled", "counters", "sweep"]
STUB = f"""#!{sys.executable}
import json, os, pathlib, sys, time
arguments = sys.argv[1:]
name = pathlib.Path(sys.argv[0]).name
if arguments[:1] == ["-c"]:
    missing = [module for module in arguments[2:] if module in os.environ.get("MISSING", "").split()]
    print(*missing[:1])
    sys.exit()
with open(os.environ["CALLS"], "a") as calls:
    calls.write(json.dumps([name, *arguments]) + "\\n")
print("a table of", name, *arguments)
if os.environ.get("BREAKS", "nothing") in arguments:
    sys.exit(3)
if os.environ.get("HANGS", "nothing") in arguments:
    time.sleep(600)
"""


class Machine:
    """A folder of stubs, in front of the system's commands."""

    def __init__(self, folder: Path) -> None:
        self.out = folder / "out"
        self.calls = folder / "calls"
        self.bin = folder / "bin"
        self.bin.mkdir()
        for name in ("python3", "ncu", "nvidia-smi"):
            (self.bin / name).write_text(STUB, encoding="utf-8")
            (self.bin / name).chmod(0o755)

    def run(self, *steps: str, status: int = 0, **variables: str) -> list[list[str]]:
        """Runs the script; gives the calls of Python and ncu, in order."""
        path = f"{self.bin}:{os.environ['PATH']}"
        environment = {**os.environ, "PATH": path, "CALLS": str(self.calls), **variables}
        result = subprocess.run(
            [SCRIPT, str(self.out), *steps], env=environment, capture_output=True, text=True, check=False
        )
        assert result.returncode == status, result.stderr
        calls = self.calls.read_text(encoding="utf-8").splitlines() if self.calls.exists() else []
        return [call for call in map(json.loads, calls) if call[0] != "nvidia-smi"]

    def results(self) -> dict[str, str]:
        with (self.out / "steps.csv").open(newline="", encoding="utf-8") as stream:
            return {row["step"]: row["result"] for row in csv.DictReader(stream)}


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


def test_every_step_runs_in_order(machine: Machine) -> None:
    calls = machine.run(COMMIT="0123abc")
    assert machine.results() == dict.fromkeys(STEPS, "done")
    assert list(machine.results()) == STEPS
    assert len(calls) == len(STEPS)
    summary = (machine.out / "summary.txt").read_text(encoding="utf-8")
    log = (machine.out / "log.txt").read_text(encoding="utf-8")
    for step in STEPS:
        assert f"{step}: done" in summary
        assert f"== {step}: " in log
    assert summary.count("a table of") >= len(STEPS)


def test_the_benchmarks_take_these_arguments(machine: Machine) -> None:
    parsers = {"benchmarks.fusion": fusion.build_parser, "benchmarks.tokenizer": tokenizer.build_parser}
    outputs = []
    for call in machine.run(COMMIT="0123abc"):
        if call[0] == "ncu":
            call = call[call.index("python3") :]
        if call[2] in parsers:
            arguments: Any = parsers[call[2]]().parse_args(call[3:])
            assert arguments.device == "cuda"
            outputs.append(arguments.output)
    assert len(outputs) == 8
    assert set(outputs) == {machine.out / "fusion.csv", machine.out / "tokenizer.csv", None}


def test_the_tests_are_there(machine: Machine) -> None:
    (call,) = machine.run("tests")
    names = re.findall(r"def (test_\w+)", (ROOT / call[3]).read_text(encoding="utf-8"))
    for word in call[call.index("-k") + 1].split(" or "):
        assert any(word in name for name in names), word


def test_a_step_that_fails_does_not_stop_the_next(machine: Machine) -> None:
    machine.run("first", "fusion", "sweep", BREAKS="--sweep", status=1)
    assert machine.results() == {"first": "done", "fusion": "done", "sweep": "failed with 3"}
    machine.run("fusion", BREAKS="256", status=1)
    assert machine.results()["fusion"] == "failed with 3"


def test_a_step_that_hangs_is_ended(machine: Machine) -> None:
    machine.run("sweep", HANGS="--sweep", LIMIT_S="1", status=1)
    assert machine.results() == {"sweep": "ended after 1 s"}


@pytest.mark.parametrize(
    ("missing", "skipped"),
    [("pydantic", ["tokenizer", "float32", "compiled"]), ("xdist", ["tests"]), ("triton", STEPS)],
)
def test_what_is_missing_is_named(machine: Machine, missing: str, skipped: list[str]) -> None:
    calls = machine.run(MISSING=missing)
    assert len(calls) == len(STEPS) - len(skipped)
    assert machine.results() == {
        step: f"skipped without {missing}" if step in skipped else "done" for step in STEPS
    }


def test_without_a_profiler(machine: Machine) -> None:
    (machine.bin / "ncu").unlink()
    machine.run("counters")
    assert machine.results() == {"counters": "skipped without ncu"}


def test_carried_wheels_are_installed_beside_the_machine_s_packages(machine: Machine, tmp_path: Path) -> None:
    (tmp_path / "one-1-py3-none-any.whl").touch()
    install, *_ = machine.run("first", WHEELS=str(tmp_path))
    assert install[:5] == ["python3", "-m", "pip", "install", "-q"]
    assert {"--no-index", "--no-deps", "--target"} <= set(install)
    assert install[-1] == str(tmp_path / "one-1-py3-none-any.whl")


def test_wheels_are_pinned(machine: Machine, tmp_path: Path) -> None:
    environment = {**os.environ, "PATH": f"{machine.bin}:{os.environ['PATH']}", "CALLS": str(machine.calls)}
    subprocess.run([SCRIPT, "wheels", str(tmp_path)], env=environment, check=True, capture_output=True)
    (call,) = map(json.loads, machine.calls.read_text(encoding="utf-8").splitlines())
    pins = [argument.partition("==")[0] for argument in call if "==" in argument]
    assert sorted(pins) == ["annotated-types", "diffusers", "pydantic", "pydantic-core", "typing-inspection"]


def test_an_unknown_step_is_refused(machine: Machine) -> None:
    assert machine.run("frist", status=2) == []
    assert not machine.out.exists()


def test_the_benchmarks_need_no_more_than_the_script_says() -> None:
    """Of the project's dependencies, on a machine that lacks the service's and the training's."""
    absent = (
        "fastapi",
        "starlette",
        "uvicorn",
        "httptools",
        "pydantic_settings",
        "prometheus_client",
        "httpx",
    )
    absent += ("uvloop", "python_multipart", "yaml", "matplotlib", "diffusers", "opentelemetry")
    code = (
        f"import sys; sys.modules.update(dict.fromkeys({absent})); "
        "from benchmarks import fusion, tokenizer; tokenizer.main(['--help'])"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
