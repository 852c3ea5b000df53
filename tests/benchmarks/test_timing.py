"""Rounds, quantiles and ceilings."""

import pytest
import torch

from benchmarks.harness.timing import WARMUP_ROUNDS, measure_ceilings, time_interleaved

CPU = torch.device("cpu")


@pytest.mark.parametrize("label", ["", "with a progress bar"])
def test_calls_take_turns(label: str) -> None:
    order: list[str] = []

    def call(name: str) -> torch.Tensor:
        order.append(name)
        return torch.zeros(())

    timings = time_interleaved({"a": lambda: call("a"), "b": lambda: call("b")}, CPU, 3, label)
    assert order == ["a", "b"] * (3 + WARMUP_ROUNDS["cpu"])
    for timing in timings.values():
        assert timing.num_runs == 3
        assert 0 < timing.p20_ms <= timing.p50_ms <= timing.p80_ms


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_ceilings(small_ceilings: None, dtype: torch.dtype) -> None:
    ceilings = measure_ceilings(CPU, dtype)
    assert ceilings.matrix_tflops > 0
    assert ceilings.copy_gb_per_s > 0


@pytest.mark.gpu
def test_events_time_the_device(small_ceilings: None) -> None:
    matrix = torch.randn(2048, 2048, device="cuda")
    calls = {"one": lambda: matrix @ matrix, "four": lambda: matrix @ matrix @ matrix @ matrix @ matrix}
    timings = time_interleaved(calls, matrix.device, 20)
    assert 2 < timings["four"].p50_ms / timings["one"].p50_ms < 8
    assert measure_ceilings(matrix.device, torch.bfloat16).matrix_tflops > 1
