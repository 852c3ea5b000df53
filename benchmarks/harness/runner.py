"""One case of a benchmark: implementations are built, checked for their result, then timed side by side."""

import logging
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.harness.provenance import Provenance
from benchmarks.harness.results import Row
from benchmarks.harness.timing import Call, Timing, time_interleaved

logger = logging.getLogger(__name__)

# Largest relative error that is still timed: several times that of the implementations, far below that of
# a wrong fusion (0.3 with the correction's beta of 0.2).
TOLERANCES = {torch.float32: 2e-3, torch.float16: 1e-2, torch.bfloat16: 5e-2}

Builder = Callable[[], Call]


class UnavailableError(Exception):
    """An implementation that cannot run here; says why."""


@dataclass(frozen=True)
class Setup:
    """Shared by the cases of one run."""

    device: torch.device
    dtype: torch.dtype
    batches: Sequence[int]
    num_runs: int
    provenance: Provenance


@dataclass(frozen=True)
class Measurement:
    """One implementation's result in one case."""

    timing: Timing
    relative_error: float


@torch.no_grad()
def measure(
    builders: Mapping[str, Builder],
    error_of: Callable[[str, Tensor], float],
    setup: Setup,
    label: str,
) -> dict[str, Measurement]:
    """Time the implementations that run and give the right result; one line in the log for each other.

    Args:
        builders: make an implementation ready to call, by name; they may compile or allocate.
        error_of: relative error of an implementation's result.
        setup: device, dtype and number of runs.
        label: the case, for people.
    """
    if "torch._dynamo" in sys.modules:
        torch.compiler.reset()  # it gives up on a function after a few sizes
    calls, errors = {}, {}
    for name, build in builders.items():
        try:
            call = build()
            error = error_of(name, call())
        except Exception as exc:  # one implementation that cannot run must not stop the others
            report_skipped(f"{name} ({label})", exc)
            continue
        if error <= TOLERANCES[setup.dtype]:  # false for NaN
            calls[name], errors[name] = call, error
        else:
            logger.warning("skipped %s (%s): wrong result, relative error %.3g", name, label, error)
    timings = time_interleaved(calls, setup.device, setup.num_runs, label)
    return {name: Measurement(timings[name], errors[name]) for name in calls}


def unless_out_of_memory(label: str, case: Callable[[], Iterable[Row]]) -> list[Row]:
    """A case's rows, or none and a line in the log where the device's memory does not hold it."""
    try:
        return list(case())
    except torch.OutOfMemoryError as exc:
        report_skipped(label, exc)
        return []


def report_skipped(what: str, exc: Exception) -> None:
    """One line that names the skipped case, and why."""
    reason = next(iter(str(exc).strip().splitlines()), "")
    kind = "" if isinstance(exc, UnavailableError) else f"{type(exc).__name__}: "
    logger.warning("skipped %s: %s%s", what, kind, reason[:300])
    logger.debug("traceback", exc_info=exc)


def relative_error(found: Tensor, expected: Tensor) -> float:
    """``|found - expected| / |expected|`` in float64 on the CPU."""
    wanted = expected.double().cpu()
    return float((found.double().cpu() - wanted).norm() / wanted.norm())
