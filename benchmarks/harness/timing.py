"""Timing on CUDA and on CPUs, and the two measured rates that bound every implementation."""

import importlib.util
import logging
import subprocess
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

logger = logging.getLogger(__name__)

Call = Callable[[], Tensor]

WARMUP_ROUNDS = {"cuda": 5, "cpu": 1}
FLUSH_BYTES = 256 * 2**20  # several times the L2 cache of an H100 (50 MB) or an H200 (60 MB)
MATRIX_SIDES = {"cuda": (4096, 8192, 16384), "cpu": (1024, 2048)}
COPY_BYTES = {"cuda": 2**30, "cpu": 2**28}
RATE_RUNS = {"cuda": 20, "cpu": 5}
HEAD_START_CYCLES = 4_000_000  # some 2 ms: longer than the host takes to launch one call of a few kernels
WARM_S = 2.0  # of products before the first figure, after which a GPU runs at the clock that its power allows


@dataclass(frozen=True)
class Timing:
    """Quantiles of one implementation's runs, milliseconds."""

    p20_ms: float
    p50_ms: float
    p80_ms: float
    num_runs: int
    sm_mhz: float | None = None
    """The GPU's clock at the end of the rounds, as nvidia-smi says it; None elsewhere."""
    power_w: float | None = None
    """Its power, likewise."""


@dataclass(frozen=True)
class Ceilings:
    """Rates that the device reaches in this run: no implementation gets far past either."""

    matrix_tflops: float
    """Best rate of a large square product in the benchmark's dtype, random data."""
    copy_gb_per_s: float
    """Rate of a large copy within the device's memory, bytes read plus bytes written."""


class _Clock(Protocol):
    def run(self, name: str, call: Call) -> None: ...

    def durations_ms(self) -> Mapping[str, list[float]]: ...


class _HostClock:
    """Wall clock around calls that return when they are done."""

    def __init__(self) -> None:
        self._durations: defaultdict[str, list[float]] = defaultdict(list)

    def run(self, name: str, call: Call) -> None:
        begin = time.perf_counter()
        call()
        self._durations[name].append(1e3 * (time.perf_counter() - begin))

    def durations_ms(self) -> Mapping[str, list[float]]:
        return self._durations


class _EventClock:
    """CUDA events around calls that only queue work; the L2 cache holds nothing of theirs before each.

    Args:
        device: the GPU.
        head_start: the device waits until the call is launched, so that the time is the device's alone.
            Otherwise the call starts on an idle device, and its launches count as far as they take longer
            than the work: as a caller sees it who waits for each result.
    """

    def __init__(self, device: torch.device, head_start: bool) -> None:
        self._unrelated = torch.zeros(FLUSH_BYTES // 4, dtype=torch.int32, device=device)
        self._head_start = head_start
        self._events: defaultdict[str, list[tuple[torch.cuda.Event, torch.cuda.Event]]] = defaultdict(list)

    def run(self, name: str, call: Call) -> None:
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        self._unrelated.amax()  # a read: lines that were written would go to memory during the call
        if self._head_start:
            torch.cuda._sleep(HEAD_START_CYCLES)
        else:
            torch.cuda.synchronize()
        begin.record()
        call()
        end.record()
        self._events[name].append((begin, end))

    def durations_ms(self) -> Mapping[str, list[float]]:
        torch.cuda.synchronize()
        return {
            name: [begin.elapsed_time(end) for begin, end in pairs] for name, pairs in self._events.items()
        }


@torch.no_grad()
def time_interleaved(
    calls: Mapping[str, Call],
    device: torch.device,
    num_runs: int,
    label: str = "",
    head_start: bool = False,
) -> dict[str, Timing]:
    """Time calls side by side, one run of each a round, so that drift of the machine meets all alike.

    Args:
        calls: the timed functions, by name.
        device: CUDA (events, cold L2 cache) or CPU (wall clock).
        num_runs: rounds, after the warm-up.
        label: of the progress bar.
        head_start: on CUDA, leave out the time that the host takes to launch a call.
    """
    for _ in range(WARMUP_ROUNDS[device.type]):
        for call in calls.values():
            call()
    clock: _Clock = _EventClock(device, head_start) if device.type == "cuda" else _HostClock()
    for _ in _progress(range(num_runs), label):
        for name, call in calls.items():
            clock.run(name, call)
    state = device_state(device)  # while the last rounds run
    return {
        name: Timing(*_quantiles(found), len(found), *state) for name, found in clock.durations_ms().items()
    }


def device_state(device: torch.device) -> tuple[float | None, float | None]:
    """A GPU's clock in MHz and its power in watts; None where nvidia-smi does not say them."""
    if device.type != "cuda":
        return None, None
    uuid = torch.cuda.get_device_properties(device).uuid
    command = ["nvidia-smi", "-i", f"GPU-{uuid}", "--query-gpu=clocks.sm,power.draw"]
    try:
        found = subprocess.run(
            [*command, "--format=csv,noheader,nounits"],
            capture_output=True,
            text=True,
            check=True,
            timeout=10,
        )
        clock, power = map(float, found.stdout.split(","))
    except (OSError, subprocess.SubprocessError, ValueError):
        return None, None
    return clock, power


def measure_ceilings(device: torch.device, dtype: torch.dtype) -> Ceilings:
    """Measure the rates of a large product and of a large copy.

    float32 products run at torch's default precision: without TF32.
    """
    _warm_up(device, dtype)
    rates = [_matrix_rate(side, device, dtype) for side in MATRIX_SIDES[device.type]]
    return Ceilings(matrix_tflops=max(rates), copy_gb_per_s=_copy_rate(device))


def _warm_up(device: torch.device, dtype: torch.dtype) -> None:
    """Bring a GPU to its power limit, where it stays for the rest of the run."""
    if device.type != "cuda":
        return
    matrix = torch.randn(MATRIX_SIDES["cuda"][0], MATRIX_SIDES["cuda"][0], device=device, dtype=dtype)
    end = time.perf_counter() + WARM_S
    while time.perf_counter() < end:
        matrix @ matrix
        torch.cuda.synchronize()


def _matrix_rate(side: int, device: torch.device, dtype: torch.dtype) -> float:
    left, right = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    out = torch.empty_like(left)
    duration_ms = _duration_ms(lambda: torch.mm(left, right, out=out), device)
    return 2 * side**3 / duration_ms / 1e9


def _copy_rate(device: torch.device) -> float:
    source = torch.randint(256, (COPY_BYTES[device.type],), dtype=torch.uint8, device=device)
    destination = torch.empty_like(source)
    return 2 * len(source) / _duration_ms(lambda: destination.copy_(source), device) / 1e6


def _duration_ms(call: Call, device: torch.device) -> float:
    return time_interleaved({"call": call}, device, RATE_RUNS[device.type], head_start=True)["call"].p50_ms


def _quantiles(durations_ms: list[float]) -> tuple[float, float, float]:
    points = torch.tensor([0.2, 0.5, 0.8], dtype=torch.float64)
    p20, p50, p80 = torch.tensor(durations_ms, dtype=torch.float64).quantile(points).tolist()
    return p20, p50, p80


def _progress(rounds: Iterable[int], label: str) -> Iterable[int]:
    """A bar on a terminal where tqdm is installed; a line in the log anyway."""
    if not label:
        return rounds
    logger.info("timing %s", label)
    if importlib.util.find_spec("tqdm") is None:
        return rounds
    from tqdm import tqdm

    return tqdm(rounds, desc=label, leave=False, disable=None)
