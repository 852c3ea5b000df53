"""Rounds, quantiles and ceilings."""

import pytest
import torch

from benchmarks.harness import timing
from benchmarks.harness.timing import WARMUP_ROUNDS, device_state, measure_ceilings, time_interleaved

CPU = torch.device("cpu")


@pytest.mark.parametrize("label", ["", "with a progress bar"])
def test_calls_take_turns(label: str) -> None:
    order: list[str] = []

    def call(name: str) -> torch.Tensor:
        order.append(name)
        return torch.zeros(())

    timings = time_interleaved({"a": lambda: call("a"), "b": lambda: call("b")}, CPU, 3, label)
    assert order == ["a", "b"] * (3 + WARMUP_ROUNDS["cpu"])
    for found in timings.values():
        assert found.num_runs == 3
        assert 0 < found.p20_ms <= found.p50_ms <= found.p80_ms


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_ceilings(small_ceilings: None, dtype: torch.dtype) -> None:
    ceilings = measure_ceilings(CPU, dtype)
    assert ceilings.matrix_tflops > 0
    assert ceilings.copy_gb_per_s > 0


@pytest.mark.parametrize(("head_start", "waits_for"), [(True, "sleep"), (False, "synchronize")])
def test_a_run_on_a_gpu_begins_alike_whoever_ran_before(
    monkeypatch: pytest.MonkeyPatch, head_start: bool, waits_for: str
) -> None:
    """The cache is emptied by a read; then the device waits for the launches, or the host for the device."""
    order: list[str] = []

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            order.append("event")

    monkeypatch.setattr(timing, "FLUSH_BYTES", 64)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: order.append("sleep"))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: order.append("synchronize"))
    clock = timing._EventClock(CPU, head_start)
    version = clock._unrelated._version

    def call() -> torch.Tensor:
        order.append("call")
        return torch.zeros(())

    clock.run("name", call)
    assert order == [waits_for, "event", "call", "event"]
    assert clock._unrelated._version == version, "written"


def test_a_cpu_has_no_clock_to_record() -> None:
    assert device_state(CPU) == (None, None)


@pytest.mark.gpu
def test_events_time_the_device(small_ceilings: None) -> None:
    matrix = torch.randn(2048, 2048, device="cuda")
    calls = {"one": lambda: matrix @ matrix, "four": lambda: matrix @ matrix @ matrix @ matrix @ matrix}
    timings = time_interleaved(calls, matrix.device, 20)
    assert 2 < timings["four"].p50_ms / timings["one"].p50_ms < 8
    assert measure_ceilings(matrix.device, torch.bfloat16).matrix_tflops > 1
    assert timings["one"].sm_mhz is not None
