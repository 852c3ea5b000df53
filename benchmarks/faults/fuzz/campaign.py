"""The fuzz: many malformed requests, none of which may be answered with a 5xx or hurt the service."""

import asyncio
import logging
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import httpx

from benchmarks.faults.fuzz.cases import Case, make_case
from benchmarks.harness.service import Service, launch
from benchmarks.probes.checks import Check, Findings, Options
from benchmarks.probes.inputs import Inputs, encode_request, load_inputs
from benchmarks.probes.wire import Answer, exchange

logger = logging.getLogger(__name__)

DEFAULT_COUNT = 10_000
QUICK_COUNT = 300
CONCURRENCY = 8
MAX_TIMEOUT_S = 120.0
BUSY_STATUSES = (429, 503, 504)
"""Refusals for lack of room or time: no fault, and counted apart."""
PROTOCOL_STATUSES = (501, 505)
"""Refusals of a transfer coding or a version of HTTP: the client's fault, by numbers like ours."""
_PROGRESS = 1_000
_MIB = 2**20


@dataclass
class Tally:
    """Answers, counted."""

    answers: Counter[tuple[str, int]] = field(default_factory=Counter)
    """By route and status; status 0 where the connection ended without an answer."""
    busy: int = 0
    server_errors: int = 0
    silent: int = 0
    """Requests that said truly where they end and got no answer."""
    bad_problems: int = 0
    """Refusals that are no well-formed problem document."""
    unread: int = 0
    """Refusals in plain text by the HTTP parser: what came was no HTTP request."""

    def add(self, case: Case, answer: Answer) -> str | None:
        """Count an answer; gives its fault, or None."""
        self.answers[case.route, answer.status] += 1
        if answer.status in BUSY_STATUSES:
            self.busy += 1
        elif answer.status >= 500 and answer.status not in PROTOCOL_STATUSES:
            self.server_errors += 1
            return f"status {answer.status}: {answer.body[:300]!r}"
        if not answer.complete and not case.is_head:
            if case.framed:
                self.silent += 1
                return f"no whole answer, {answer.num_bytes} bytes"
            return None
        if answer.status < 400:
            return None
        if answer.headers.get("content-type", "").startswith("text/plain") and answer.status == 400:
            self.unread += 1
            return None
        fault = answer.problem_fault()
        if fault is None or case.is_head:
            return None
        self.bad_problems += 1
        return f"status {answer.status} is no problem document: {fault}"


def run_fuzz(options: Options) -> list[Check]:
    """The scenario: `DEFAULT_COUNT` cases, `CONCURRENCY` at a time."""
    count = options.count or (QUICK_COUNT if options.quick else DEFAULT_COUNT)
    findings = Findings("fuzz")
    with launch({"log_level": "error", **options.settings}) as service:
        inputs = inputs_for(service, options)
        asyncio.run(_warm(service, inputs))
        before_bytes, started_s = service.rss_bytes(), time.monotonic()
        tally, slowest_s = asyncio.run(_campaign(service, inputs, options, count))
        _report(findings, tally, count)
        findings.report("seconds", time.monotonic() - started_s)
        findings.report("slowest answer, seconds", slowest_s)
        findings.report("resident memory before, MiB", before_bytes / _MIB)
        findings.report("resident memory after, MiB", service.rss_bytes() / _MIB)
        findings.exactly("processes that crashed", 0 if service.alive else 1, 0)
        findings.exactly("ready afterwards", service.answers("/readyz"), 1)
        if not service.alive:
            logger.error(
                "the service ended with status %s\n%s", service.process.returncode, service.log_tail()
            )
    return findings.checks


def replay(path: Path, options: Options) -> Answer:
    """Send one saved request to a fresh service."""
    with launch(options.settings) as service:
        answer = asyncio.run(exchange(service.url, path.read_bytes(), timeout_s=MAX_TIMEOUT_S, finish=True))
        logger.info("%s", service.log_tail())
    return answer


def inputs_for(service: Service, options: Options) -> Inputs:
    """Inputs of the running model's shapes."""
    info = httpx.get(f"{service.url}/info", timeout=30).raise_for_status().json()
    return load_inputs(options, info["latent"]["shape"], info["image_size"])


async def _warm(service: Service, inputs: Inputs) -> None:
    photo = encode_request(inputs.photos[0])
    await asyncio.gather(*(exchange(service.url, photo) for _ in range(2 * CONCURRENCY)))


async def _campaign(service: Service, inputs: Inputs, options: Options, count: int) -> tuple[Tally, float]:
    """All cases; what came back, and how long the slowest took."""
    tally, numbers, slowest_s = Tally(), iter(range(count)), [0.0]

    async def work(numbers: Iterator[int]) -> None:
        for number in numbers:
            if not service.alive:
                return
            case = make_case(inputs, options.seed, number)
            started_s = time.monotonic()
            answer = await exchange(
                service.url, case.message, timeout_s=MAX_TIMEOUT_S, finish=not case.framed
            )
            slowest_s[0] = max(slowest_s[0], time.monotonic() - started_s)
            fault = tally.add(case, answer)
            if fault is not None:
                _save(case, fault, options)
            if number % _PROGRESS == _PROGRESS - 1:
                logger.info("fuzz: %d of %d", number + 1, count)

    await asyncio.gather(*(work(numbers) for _ in range(CONCURRENCY)))
    return tally, slowest_s[0]


def _save(case: Case, fault: str, options: Options) -> None:
    options.save.mkdir(parents=True, exist_ok=True)
    path = options.save / f"seed{options.seed}-case{case.index}.http"
    path.write_bytes(case.message)
    logger.warning("%s (%s %s, %s): %s", path, case.route, case.kind, case.how, fault)


def _report(findings: Findings, tally: Tally, count: int) -> None:
    findings.exactly("requests", tally.answers.total(), count)
    findings.exactly("answers 5xx", tally.server_errors, 0)
    findings.exactly("well-framed requests without an answer", tally.silent, 0)
    findings.exactly("refusals that are no problem document", tally.bad_problems, 0)
    findings.report("answers 429, 503 or 504", tally.busy)
    findings.report("answers 400 by the HTTP parser", tally.unread)
    by_status: Counter[int] = Counter()
    for (_, status), number in tally.answers.items():
        by_status[status] += number
    for status, number in sorted(by_status.items()):
        findings.report(f"status {status or 'none'}", number)
    for (route, status), number in sorted(tally.answers.items()):
        if route in ("/encode", "/decode", "/reconstruct"):
            findings.report(f"{route} status {status or 'none'}", number)
