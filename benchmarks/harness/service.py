"""A service in a process of its own: started, watched from outside through ``/proc``, and always ended."""

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, TypeVar

import httpx
from prometheus_client.parser import text_string_to_metric_families

from benchmarks.harness.provenance import ROOT

ENV_PREFIX = "DRORAE_"
Labels = tuple[tuple[str, str], ...]
"""Names and values of a series' labels, sorted."""
Result = TypeVar("Result")

_POLL_INTERVAL_S = 0.02
_TAIL_BYTES = 4000
_DECODER = "service.photos.process"
PARTS = ("main", "fronts", "decoders")
"""Processes of a service: the first one, which has the engine; fronts, or a peer's workers; decoders."""
_TICKS_PER_S = os.sysconf("SC_CLK_TCK")
_PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")


class LaunchError(Exception):
    """A service that did not start, did not become ready or did not end; shows the end of its log."""


class Service:
    """A running service.

    Attributes:
        url: its address, without a slash at the end.
        process: the process itself; measurements include its children.
    """

    def __init__(self, process: subprocess.Popen[bytes], url: str, log: Path) -> None:
        self.process = process
        self.url = url
        self.log = log

    def __repr__(self) -> str:
        return f"Service({self.url}, pid={self.pid}, status={self.process.poll()})"

    @property
    def pid(self) -> int:
        return self.process.pid

    @property
    def alive(self) -> bool:
        """Whether the process that was started still runs."""
        return self.process.poll() is None

    def rss_bytes(self) -> int:
        """Resident memory of the process and its children, bytes; shared pages count for each."""
        return round(self._total(lambda pid: _PAGE_BYTES * int(_read(pid, "statm").split()[1])))

    def num_fds(self) -> int:
        """Open file descriptors of the process and its children."""
        return round(self._total(lambda pid: len(os.listdir(f"/proc/{pid}/fd"))))

    def num_threads(self) -> int:
        """Threads of the process and its children."""
        return round(self._total(lambda pid: int(_stat(pid)[17])))

    def cpu_seconds(self) -> float:
        """CPU time since the start, seconds: user and system, children that have ended included."""
        return self._total(lambda pid: sum(map(int, _stat(pid)[11:15]))) / _TICKS_PER_S

    def cpu_seconds_by_part(self) -> dict[str, float]:
        """CPU time of the living processes, seconds, by `PARTS`."""
        seconds = dict.fromkeys(PARTS, 0.0)
        for pid in self._family():
            with suppress(FileNotFoundError, ProcessLookupError):  # it ended meanwhile
                is_decoder = _DECODER in _read(pid, "cmdline").split("\0")
                part = "main" if pid == self.pid else "decoders" if is_decoder else "fronts"
                seconds[part] += sum(map(int, _stat(pid)[11:13])) / _TICKS_PER_S
        return seconds

    def children(self) -> list[int]:
        """Process ids of the living children."""
        return [pid for pid, parent in _parents().items() if parent == self.pid]

    def metrics(self) -> dict[tuple[str, Labels], float]:
        """Every sample of ``/metrics`` by name and labels.

        Raises:
            httpx.HTTPError: the service does not answer.
        """
        response = httpx.get(f"{self.url}/metrics", timeout=30)
        response.raise_for_status()
        return {
            (sample.name, tuple(sorted(sample.labels.items()))): sample.value
            for family in text_string_to_metric_families(response.text)
            for sample in family.samples
        }

    def metric(self, name: str, **labels: str) -> float:
        """Sum of the samples of one name that carry these labels; 0 where there are none.

        Raises:
            httpx.HTTPError: the service does not answer.
        """
        wanted = set(labels.items())
        return sum(
            value
            for (sample, present), value in self.metrics().items()
            if sample == name and wanted <= set(present)
        )

    def status_of(self, path: str, timeout_s: float = 5.0) -> int:
        """HTTP status of a GET, 0 where no answer came."""
        try:
            return httpx.get(self.url + path, timeout=timeout_s).status_code
        except httpx.TransportError:
            return 0

    def answers(self, path: str) -> bool:
        """Whether a GET is answered with 200."""
        return self.status_of(path) == 200

    def stop(self, with_signal: int = signal.SIGTERM, timeout_s: float = 60.0) -> int:
        """Send the signal and wait for the end; returns the exit status.

        Raises:
            LaunchError: it runs on.
        """
        self.process.send_signal(with_signal)
        return self.wait(timeout_s)

    def wait(self, timeout_s: float) -> int:
        """Wait until the process ends by itself; returns its exit status.

        Raises:
            LaunchError: it runs on.
        """
        try:
            return self.process.wait(timeout_s)
        except subprocess.TimeoutExpired as exc:
            raise LaunchError(f"the service did not end within {timeout_s:g} s\n{self.log_tail()}") from exc

    def log_tail(self) -> str:
        """The last lines of the service's log."""
        return _tail(self.log)

    def _total(self, measure: Callable[[int], float]) -> float:
        total = 0.0
        for pid in self._family():
            with suppress(FileNotFoundError, ProcessLookupError):  # it ended meanwhile
                total += measure(pid)
        return total

    def _family(self) -> list[int]:
        """The process and its living descendants."""
        parents = _parents()
        family = [self.pid]
        for member in family:
            family += [pid for pid, parent in parents.items() if parent == member]
        return family


@contextmanager
def launch(
    settings: Mapping[str, str],
    module: str = "service",
    arguments: Sequence[str] = (),
    *,
    ready_path: str | None = "/readyz",
    ready_timeout_s: float = 120.0,
    environment: Mapping[str, str] | None = None,
) -> Iterator[Service]:
    """Run ``python -m module`` until the block ends, on a free port of 127.0.0.1.

    Args:
        settings: of the service, by field name, such as ``{"batch_size": "8"}``; those of the
            surrounding environment are left out.
        module: run by ``-m``; its first line ends with its address, after the word ``on``.
        arguments: of the module.
        ready_path: answers 200 once the service is ready; None does not wait.
        ready_timeout_s: how long to wait for that, seconds.
        environment: further variables.

    Raises:
        LaunchError: it ended, or did not become ready in time.
    """
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(ENV_PREFIX)}
    own = {f"{ENV_PREFIX}{name.upper()}": value for name, value in {"port": "0", **settings}.items()}
    with tempfile.TemporaryDirectory(prefix="drorae-launch-") as folder:
        output, log = Path(folder, "stdout"), Path(folder, "stderr")
        with output.open("wb") as stdout, log.open("wb") as stderr:
            process = _spawn(module, arguments, {**inherited, **own, **(environment or {})}, stdout, stderr)
        try:
            limit_s = time.monotonic() + ready_timeout_s
            url = _until(lambda: _address(output), process, log, limit_s, "name its address")
            service = Service(process, url, log)
            if ready_path is not None:
                _until(lambda: service.answers(ready_path) or None, process, log, limit_s, "become ready")
            yield service
        finally:
            _end(process)


def _spawn(
    module: str,
    arguments: Sequence[str],
    environment: Mapping[str, str],
    stdout: IO[bytes],
    stderr: IO[bytes],
) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-m", module, *arguments],
        cwd=ROOT,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=stdout,
        stderr=stderr,
        start_new_session=True,  # so that what it starts ends with it
    )


def _until(
    attempt: Callable[[], Result | None],
    process: subprocess.Popen[bytes],
    log: Path,
    limit_s: float,
    what: str,
) -> Result:
    """Try until something comes back."""
    while (found := attempt()) is None:
        if process.poll() is not None:
            raise LaunchError(f"the service ended with status {process.returncode}\n{_tail(log)}")
        if time.monotonic() > limit_s:
            raise LaunchError(f"the service did not {what} in time\n{_tail(log)}")
        time.sleep(_POLL_INTERVAL_S)
    return found


def _address(output: Path) -> str | None:
    """The address in the first line, once that line is complete."""
    line, newline, _ = output.read_text(encoding="utf-8", errors="replace").partition("\n")
    return line.rpartition(" on ")[2].strip() if newline else None


def _end(process: subprocess.Popen[bytes]) -> None:
    """Kill whatever is left of the process and what it started."""
    with suppress(ProcessLookupError):  # all of it has ended
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _tail(log: Path) -> str:
    return log.read_bytes()[-_TAIL_BYTES:].decode("utf-8", "replace")


def _parents() -> dict[int, int]:
    """Parent of every process."""
    parents = {}
    for entry in os.listdir("/proc"):
        if entry.isdecimal():
            with suppress(FileNotFoundError, ProcessLookupError):  # it ended meanwhile
                parents[int(entry)] = int(_stat(int(entry))[1])
    return parents


def _stat(pid: int) -> list[str]:
    """Fields of ``/proc/PID/stat`` from the third on: those before hold the name, spaces and all."""
    return _read(pid, "stat").rpartition(")")[2].split()


def _read(pid: int, name: str) -> str:
    return Path(f"/proc/{pid}/{name}").read_text(encoding="utf-8", errors="replace")
