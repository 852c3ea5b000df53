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
    tolerance: float,
    head_start: bool = False,
) -> dict[str, Measurement]:
    """Time the implementations that run and give the right result; one line in the log for each other.

    Args:
        builders: make an implementation ready to call, by name; they may compile or allocate.
        error_of: relative error of an implementation's result.
        setup: device, dtype and number of runs.
        label: the case, for people.
        tolerance: the largest relative error that is still timed.
        head_start: as `benchmarks.harness.timing.time_interleaved` takes it.
    """
    if "torch._dynamo" in sys.modules:
        torch.compiler.reset()  # it gives up on a function after a few sizes
    calls, errors = {}, {}
    for name, build in builders.items():
        try:
            call = build()
            error = error_of(name, _complete_result(call))
        except Exception as exc:  # one implementation that cannot run must not stop the others
            report_skipped(f"{name} ({label})", exc)
            continue
        if error <= tolerance:  # false for NaN
            calls[name], errors[name] = call, error
        else:
            logger.warning("skipped %s (%s): wrong result, relative error %.3g", name, label, error)
    timings = time_interleaved(calls, setup.device, setup.num_runs, label, head_start)
    return {name: Measurement(timings[name], errors[name]) for name in calls}


def _complete_result(call: Call) -> Tensor:
    """A call's result where memory of results held NaN before, so that an element left unwritten shows.

    Raises:
        UnavailableError: an element is not finite.
    """
    call().fill_(float("nan"))  # the next result takes this memory, whether the allocator's or a graph's
    found = call()
    if not bool(torch.isfinite(found).all()):
        raise UnavailableError("wrong result, not finite everywhere")
    return found


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
