"""Starts on a busy machine: every one becomes ready, however slowly, and ends in order."""

import logging
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

from benchmarks.harness.service import LaunchError, launch
from benchmarks.probes.checks import Check, Findings, Options
from model.process import num_cpus

logger = logging.getLogger(__name__)

NUM_STARTS, QUICK_STARTS = 30, 2
_READY_S = 600.0


def run_starts(options: Options) -> list[Check]:
    """The scenario: `NUM_STARTS` services, one after the other, beside a busy loop on every CPU."""
    findings = Findings("starts")
    num_starts = options.count or (QUICK_STARTS if options.quick else NUM_STARTS)
    settings = {"log_level": "error", **options.settings}
    times_s: list[float] = []
    num_orderly = 0
    with busy_cpus():
        for number in range(num_starts):
            started_s = time.monotonic()
            try:
                with launch(settings, ready_timeout_s=_READY_S) as service:
                    times_s.append(time.monotonic() - started_s)
                    status = service.stop()
            except LaunchError:
                logger.exception("starts: number %d", number + 1)
                continue
            num_orderly += status == 0
            logger.info("starts: number %d ready after %.1f s, status %d", number + 1, times_s[-1], status)
    findings.report("starts", num_starts)
    findings.exactly("starts that became ready", len(times_s), num_starts)
    findings.exactly("services that ended with status 0", num_orderly, num_starts)
    findings.report("longest time to ready, seconds", max(times_s, default=0.0))
    findings.report("median time to ready, seconds", sorted(times_s)[len(times_s) // 2] if times_s else 0.0)
    return findings.checks


@contextmanager
def busy_cpus() -> Iterator[None]:
    """A process on every CPU that does nothing else but use it."""
    loops = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(num_cpus())]
    try:
        yield
    finally:
        for loop in loops:
            loop.kill()
            loop.wait()
