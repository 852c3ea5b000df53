"""Faults of the model: a hang, no memory, a poisoned batch, a dead engine."""

import asyncio
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.faults.fuzz.campaign import inputs_for
from benchmarks.harness.service import LaunchError, Service, launch
from benchmarks.probes.checks import Check, Findings, Options
from benchmarks.probes.inputs import encode_request
from benchmarks.probes.wire import Answer, exchange

NUM_REQUESTS, QUICK_REQUESTS = 32, 8
UNREADY_WITHIN_S = 10.0
EXIT_FAULT = 3
_EXIT_WITHIN_S = 60.0
_POLL_S = 0.1
_MODULE = "benchmarks.faults.faulty_service"
_SETTINGS = {"log_level": "error", "cpu_workers": "1"}


@dataclass
class Watch:
    """Answers of `/readyz` since the fault."""

    started_s: float = field(default_factory=time.monotonic)
    unready_after_s: float = float("nan")
    unready_status: int = 0


def run_inject(options: Options) -> list[Check]:
    """The scenario: each fault in a service of its own."""
    return [
        *_run_fatal("hang", options),
        *_run_fatal("die", options),
        *_run_survived("memory", options),
        *_run_survived("poison", options),
    ]


def _run_fatal(fault: str, options: Options) -> list[Check]:
    """A fault that ends the engine: unready soon, accepted requests answered 503, exit for the supervisor."""
    findings = Findings(f"inject {fault}")
    with launch({**_SETTINGS, **options.settings}, _MODULE, [fault]) as service:
        watch, answers = asyncio.run(_fatal(service, options))
        statuses = Counter(answer.status for answer in answers)
        findings.at_most("seconds until /readyz is not 200", watch.unready_after_s, UNREADY_WITHIN_S)
        findings.exactly("status of /readyz then", watch.unready_status, 503)
        findings.report("requests accepted before and with the fault", len(answers))
        findings.report("requests answered 200", statuses[200])
        findings.report("requests answered 503", statuses[503])
        whole = sum(answer.complete and answer.status in (200, 503) for answer in answers)
        findings.exactly("requests without a whole 200 or 503", len(answers) - whole, 0)
        try:
            status = service.wait(_EXIT_WITHIN_S)
        except LaunchError:
            status = -1
        findings.exactly("exit status", status, EXIT_FAULT)
        findings.report("seconds until the exit", time.monotonic() - watch.started_s)
    return findings.checks


async def _fatal(service: Service, options: Options) -> tuple[Watch, list[Answer]]:
    inputs = inputs_for(service, options)
    await exchange(service.url, encode_request(inputs.photos[0]))
    messages = _burst(inputs.photos, inputs.marked, options)
    calls = [asyncio.create_task(exchange(service.url, message)) for message in messages]
    watch = Watch()
    watching = asyncio.create_task(_watch(service, watch))
    answers = await asyncio.gather(*calls)
    await watching
    return watch, answers


async def _watch(service: Service, watch: Watch) -> None:
    """Ask `/readyz` until it is not 200, or far too late."""
    while time.monotonic() - watch.started_s < 3 * UNREADY_WITHIN_S:
        status = await asyncio.to_thread(service.status_of, "/readyz")
        if status != 200:
            watch.unready_after_s = time.monotonic() - watch.started_s
            watch.unready_status = status
            return
        await asyncio.sleep(_POLL_S)


def _run_survived(fault: str, options: Options) -> list[Check]:
    """A fault of one item: it alone fails, and the service stays ready."""
    findings = Findings(f"inject {fault}")
    with tempfile.TemporaryDirectory(prefix="drorae-fault-") as folder:
        short = Path(folder, "short")
        arguments = [fault, "--file", str(short)]
        with launch({**_SETTINGS, **options.settings}, _MODULE, arguments) as service:
            short.touch()
            asyncio.run(_survived(service, options, findings))
            findings.exactly("ready afterwards", service.answers("/readyz"), 1)
            findings.exactly("exit status", service.stop(), 0)
    return findings.checks


async def _survived(service: Service, options: Options, findings: Findings) -> None:
    inputs = inputs_for(service, options)
    messages = _burst(inputs.photos, inputs.marked, options)
    marked = len(messages) // 2
    answers = await asyncio.gather(*(exchange(service.url, message) for message in messages))
    guilty = answers.pop(marked)
    findings.report("innocent requests", len(answers))
    innocent = sum(answer.complete and answer.status == 200 for answer in answers)
    findings.exactly("innocent requests that failed", len(answers) - innocent, 0)
    findings.report("status of the guilty request", guilty.status)
    refused = guilty.complete and guilty.status >= 400 and guilty.problem_fault() is None
    findings.exactly("guilty request answered with a problem", refused, 1)
    findings.at_least("batches split", service.metric("drorae_batch_failures_total"), 1)
    again = await exchange(service.url, encode_request(inputs.photos[0]))
    findings.exactly("status of a request afterwards", again.status, 200)


def _burst(photos: list[bytes], marked: bytes, options: Options) -> list[bytes]:
    """Single-image requests; the one in the middle carries the image that the fault waits for."""
    count = QUICK_REQUESTS if options.quick else NUM_REQUESTS
    messages = [encode_request(photos[number % len(photos)]) for number in range(count)]
    messages[count // 2] = encode_request(marked)
    return messages
