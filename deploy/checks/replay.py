"""Replay a target of the Dockerfile without a container engine, then run the result. Needs root and Debian.

    python -m deploy.checks.replay --work /var/tmp/replay

Every instruction is carried out in order, in a root file system of its own per stage: RUN in a chroot with
the stage's variables, COPY from the build context as .dockerignore leaves it. The stand-in for the base image
is a Debian bookworm with Python 3.11 (debootstrap), whose interpreter is where the official image has it. The
result is then run as the image would be: its entrypoint and variables, its user, the root read-only, /tmp a
tmpfs.
"""

import argparse
import http.client
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from deploy.checks.context import BuildContext
from deploy.checks.dockerfile import (
    Dockerfile,
    Instruction,
    Stage,
    assignments,
    copy_of,
    exec_form,
    parse_dockerfile,
    substitute,
)

ROOT = Path(__file__).parents[2]
BASE_PACKAGES = "python3,python3-venv,python3-pip,ca-certificates"
DEFAULT_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
READY_TIMEOUT_S = 180
STOP_TIMEOUT_S = 60


@dataclass
class State:
    """What a stage's next instruction finds."""

    root: Path
    environment: dict[str, str] = field(default_factory=lambda: {"PATH": DEFAULT_PATH})
    arguments: dict[str, str] = field(default_factory=dict)
    folder: str = "/"
    user: str = "0:0"

    def variables(self) -> dict[str, str]:
        return {**self.arguments, **self.environment}


class Replay:
    """Carries out the stages that a target needs.

    Args:
        dockerfile: parsed.
        work: where root file systems are made.
        build_arguments: as ``--build-arg`` gives them.
        host_environment: further variables of RUN, for what a builder's own configuration holds.
        binds: folders of this machine that RUN can read at the same place.
    """

    def __init__(
        self,
        dockerfile: Dockerfile,
        work: Path,
        build_arguments: dict[str, str],
        host_environment: dict[str, str],
        binds: Sequence[str],
    ) -> None:
        self._dockerfile = dockerfile
        self._work = work
        self._build_arguments = build_arguments
        self._host_environment = host_environment
        self._binds = binds
        self._context = BuildContext(ROOT)
        self._states: dict[str, State] = {}

    def build(self, target: str) -> State:
        """Make every stage up to the target; gives the target's."""
        for name in self._dockerfile.needed(target):
            stage = self._dockerfile.stage(name)
            say(f"--- stage {name}, from {stage.base}")
            self._states[name] = state = self._begin(stage)
            for instruction in stage.instructions:
                self._carry_out(instruction, state)
        return self._states[target]

    def _begin(self, stage: Stage) -> State:
        root = self._work / stage.name
        if root.exists():
            shutil.rmtree(root)
        before = self._states.get(stage.base)
        subprocess.run(
            ["cp", "-a", str(before.root if before else self._work / "base"), str(root)], check=True
        )
        if before is None:
            return State(root)
        return State(root, dict(before.environment), {}, before.folder, before.user)

    def _carry_out(self, instruction: Instruction, state: State) -> None:
        keyword, value = instruction.keyword, instruction.value
        if keyword == "RUN":
            self._run(value, state)
        elif keyword == "COPY":
            self._copy(instruction, state)
        elif keyword == "ENV":
            state.environment |= assignments(substitute(value, state.variables()))
        elif keyword == "ARG":
            name = value.partition("=")[0]
            given = {name: self._build_arguments[name]} if name in self._build_arguments else {}
            state.arguments |= assignments(value) | given
        elif keyword == "WORKDIR":
            state.folder = os.path.join(state.folder, substitute(value, state.variables()))
            inside(state.root, state.folder).mkdir(parents=True, exist_ok=True)
        elif keyword == "USER":
            state.user = value

    def _run(self, command: str, state: State) -> None:
        say(f"RUN {' '.join(command.split())}")
        started_s = time.monotonic()
        mounts = [f"mount --bind /proc {state.root}/proc"]
        for folder in self._binds:
            inside(state.root, folder).mkdir(parents=True, exist_ok=True)
            mounts.append(f"mount --bind {folder} {state.root}{folder}")
        script = " && ".join([*mounts, f'exec chroot --userspec={state.user} {state.root} /bin/sh -c "$1"'])
        in_folder = f"cd {state.folder} && {command}"
        environment = {**state.variables(), "HOME": state.environment.get("HOME", "/root")}
        result = subprocess.run(
            ["unshare", "--mount", "/bin/sh", "-c", script, "sh", in_folder],
            env={**environment, **self._host_environment},
            capture_output=True,
            text=True,
            check=False,
        )
        if result.returncode != 0:
            raise SystemExit(f"RUN ended with status {result.returncode}:\n{result.stdout}{result.stderr}")
        say(f"    done in {time.monotonic() - started_s:.0f} s")

    def _copy(self, instruction: Instruction, state: State) -> None:
        copy = copy_of(instruction)
        target = os.path.join(state.folder, copy.target)
        say(f"COPY {instruction.value}")
        if copy.source_stage:
            for source in copy.sources:
                origin = inside(self._states[copy.source_stage].root, source)
                inside(state.root, target).parent.mkdir(parents=True, exist_ok=True)
                subprocess.run(["cp", "-aT", str(origin), str(inside(state.root, target))], check=True)
            return
        for source in copy.sources:
            files = self._context.files(source.removeprefix("./"))
            if not files:
                raise SystemExit(f"line {instruction.line}: nothing of {source} is in the build context")
            for name in files:
                is_file = (ROOT / source).is_file()
                place = Path(name).name if is_file else str(Path(name).relative_to(source))
                destination = inside(state.root, target) / place
                destination.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(ROOT / name, destination)


def inside(root: Path, path: str) -> Path:
    """A path of a root file system, as this machine names it."""
    return root / path.lstrip("/")


def make_base(work: Path) -> None:
    """The stand-in for the Python image; kept between runs."""
    base = work / "base"
    if base.exists():
        return
    say("--- base: debootstrap bookworm")
    unfinished = work / "base.unfinished"
    shutil.rmtree(unfinished, ignore_errors=True)
    command = ["debootstrap", "--variant=minbase", f"--include={BASE_PACKAGES}", "bookworm", str(unfinished)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    (unfinished / "usr/local/bin/python").symlink_to("/usr/bin/python3")
    unfinished.rename(base)


def check_result(stage_lineage: list[Stage], state: State) -> None:
    """Run the image's entrypoint on a read-only root, as its user; wait for readiness, encode, stop.

    Raises:
        SystemExit: it does not do what the image promises.
    """
    values = {
        keyword: next(found for stage in reversed(stage_lineage) if (found := stage.last(keyword)))
        for keyword in ("ENTRYPOINT", "HEALTHCHECK", "STOPSIGNAL")
    }
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    environment = {**state.environment, "DRORAE_HOST": "127.0.0.1", "DRORAE_PORT": str(port)}
    root = state.root
    script = (
        f"mount --bind {root} {root} && mount --bind /proc {root}/proc"
        f" && mount -t tmpfs -o noexec tmpfs {root}/tmp && mount -o remount,bind,ro {root}"
        f" && exec chroot --userspec={state.user} {root}"
        f' /bin/sh -c \'cd {state.folder} && exec "$@"\' sh "$@"'
    )
    prefix = ["unshare", "--mount", "/bin/sh", "-c", script, "sh"]
    touch = subprocess.run(
        [*prefix, "touch", "/opt/drorae/x"], env=environment, capture_output=True, check=False
    )
    if touch.returncode == 0:
        raise SystemExit("the root is not read-only")
    with subprocess.Popen([*prefix, *exec_form(values["ENTRYPOINT"])], env=environment) as process:
        try:
            status, seconds = wait_until_ready(port, process)
            say(f"/readyz {status} after {seconds:.1f} s, as {state.user} on a read-only root")
            sample = (ROOT / "samples/honeybee.jpg").read_bytes()
            status, answer = request(port, "POST", "/encode", sample)
            say(f"POST /encode samples/honeybee.jpg: {status}, {len(answer)} bytes")
            if status != http.client.OK:
                raise SystemExit(answer.decode(errors="replace"))
            health = subprocess.run(
                [*prefix, *exec_form(values["HEALTHCHECK"])], env=environment, check=False
            )
            say(f"HEALTHCHECK ends with {health.returncode}")
            memory = Path(f"/proc/{process.pid}/status").read_text(encoding="utf-8")
            say(next(line for line in memory.splitlines() if line.startswith("VmHWM")).expandtabs(1))
        finally:
            process.send_signal(signal.Signals[values["STOPSIGNAL"]])
        say(f"{values['STOPSIGNAL']}: exit status {process.wait(STOP_TIMEOUT_S)}")
    if health.returncode != 0 or process.returncode != 0:
        raise SystemExit("the health check or the end was not clean")


def wait_until_ready(port: int, process: subprocess.Popen[bytes]) -> tuple[int, float]:
    """Ask /readyz until it is 200.

    Raises:
        SystemExit: the process ended, or the time is up.
    """
    started_s = time.monotonic()
    while (elapsed_s := time.monotonic() - started_s) < READY_TIMEOUT_S and process.poll() is None:
        try:
            status, _ = request(port, "GET", "/readyz")
        except OSError:
            status = 0
        if status == http.client.OK:
            return status, elapsed_s
        time.sleep(0.2)
    raise SystemExit(f"not ready after {elapsed_s:.0f} s, exit status {process.poll()}")


def request(port: int, method: str, path: str, body: bytes | None = None) -> tuple[int, bytes]:
    """One request to this machine: the status, and the answer's body."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    try:
        connection.request(method, path, body)
        answer = connection.getresponse()
        return answer.status, answer.read()
    finally:
        connection.close()


def say(line: str) -> None:
    """One line of the report."""
    print(line, flush=True)


def main(argv: Sequence[str] | None = None) -> int:
    """Build and run a target; the exit status is 0 when all of it went as the image promises."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--target", default="cpu", help="which stage (default cpu)")
    parser.add_argument("--work", type=Path, required=True, help="folder for the root file systems")
    parser.add_argument("--build-arg", action="append", default=[], metavar="NAME=VALUE")
    parser.add_argument(
        "--env", action="append", default=[], metavar="NAME", help="variable that RUN gets too"
    )
    parser.add_argument("--bind", action="append", default=[], metavar="DIR", help="folder that RUN can read")
    parser.add_argument("--build-only", action="store_true", help="do not run the result")
    arguments = parser.parse_args(argv)
    if os.geteuid() != 0 or shutil.which("debootstrap") is None:
        print("replay: needs root and debootstrap", file=sys.stderr)
        return 2
    work = arguments.work.resolve()
    work.mkdir(parents=True, exist_ok=True)
    make_base(work)
    resolver = Path("/etc/resolv.conf").read_bytes()
    (work / "base/etc/resolv.conf").write_bytes(resolver)
    dockerfile = parse_dockerfile((ROOT / "Dockerfile").read_text(encoding="utf-8"))
    build_arguments = dict(pair.split("=", 1) for pair in arguments.build_arg)
    environment = {name: os.environ[name] for name in arguments.env}
    replay = Replay(dockerfile, work, build_arguments, environment, arguments.bind)
    state = replay.build(arguments.target)
    size = subprocess.run(
        ["du", "-sm", str(state.root / "opt/drorae")], capture_output=True, text=True, check=True
    )
    say(f"/opt/drorae: {size.stdout.split()[0]} MiB")
    if not arguments.build_only:
        check_result(dockerfile.lineage(arguments.target), state)
    return 0


if __name__ == "__main__":
    sys.exit(main())
