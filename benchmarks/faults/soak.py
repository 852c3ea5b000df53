"""The soak: mixed traffic for minutes, during which nothing may grow, and after which nothing may be left."""

import asyncio
import json
import logging
import random
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import numpy as np

from benchmarks.faults.fuzz.campaign import inputs_for
from benchmarks.faults.fuzz.cases import make_case
from benchmarks.harness.service import Service, launch
from benchmarks.probes.checks import Check, Findings, Options
from benchmarks.probes.inputs import Inputs, encode_request, mixed_request
from benchmarks.probes.wire import Answer, Connection, exchange

logger = logging.getLogger(__name__)

DEFAULT_MINUTES, QUICK_MINUTES = 10.0, 0.1
MAX_GROWTH = 0.05
"""Most that resident memory may grow over the last two thirds, by its slope."""
_SAMPLE_S = 1.0
_SETTLE_S = 30.0
_BURST_EVERY_S = 10.0
_WARMUP = 64  # requests of every kind
_BURST = 400  # beyond queue_limit_items, 256
_MIB = 2**20


@dataclass(frozen=True)
class Sample:
    """The service at one moment; a gauge that it does not show is 0."""

    seconds: float
    rss_bytes: int
    num_fds: int
    num_threads: int
    pending_items: float
    queue_items: float


@dataclass
class Traffic:
    """State that the clients share, and their counts.

    Attributes:
        outcomes: by client and status; status 0 where no answer came.
    """

    service: Service
    inputs: Inputs
    rng: random.Random
    until_s: float
    outcomes: Counter[tuple[str, int]] = field(default_factory=Counter)

    @property
    def goes_on(self) -> bool:
        """Whether there is time, and a service, left."""
        return time.monotonic() < self.until_s and self.service.alive

    def count(self, client: str, answer: Answer) -> None:
        """Count an answer."""
        self.outcomes[client, answer.status if answer.complete else 0] += 1


def run_soak(options: Options) -> list[Check]:
    """The scenario: `DEFAULT_MINUTES` of good, bad, cancelled, slow and far too many requests."""
    minutes = options.minutes or (QUICK_MINUTES if options.quick else DEFAULT_MINUTES)
    findings = Findings("soak")
    with launch({"log_level": "error", **options.settings}) as service:
        inputs, rng = inputs_for(service, options), random.Random(options.seed)
        asyncio.run(_warm(Traffic(service, inputs, rng, time.monotonic() + _SETTLE_S)))
        before = asyncio.run(_settled(service))
        traffic = Traffic(service, inputs, rng, time.monotonic() + 60 * minutes)
        samples = asyncio.run(_soak(traffic, options.seed))
        after = asyncio.run(_settled(service))
        findings.report("minutes", minutes)
        _report_traffic(findings, traffic)
        _report_state(findings, samples, before, after)
        findings.exactly("processes that crashed", 0 if service.alive else 1, 0)
        findings.exactly("ready afterwards", service.answers("/readyz"), 1)
    if options.plot is not None and samples:
        draw(samples, options.plot)
    return findings.checks


def growth(samples: Sequence[Sample]) -> float:
    """Growth of resident memory over the last two thirds, by the line that fits best, as a share of the mean.

    NaN for less than three samples.
    """
    kept = samples[len(samples) // 3 :]
    if len(kept) < 3:
        return float("nan")
    seconds = np.array([sample.seconds for sample in kept])
    rss = np.array([sample.rss_bytes for sample in kept], dtype=float)
    slope = np.polyfit(seconds - seconds[0], rss, 1)[0]
    return float(slope * (seconds[-1] - seconds[0]) / rss.mean())


def draw(samples: Sequence[Sample], path: Path) -> None:
    """Resident memory, descriptors, threads and pending items over time, as a picture."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    minutes = [sample.seconds / 60 for sample in samples]
    panels: dict[str, list[float]] = {
        "resident memory, MiB": [sample.rss_bytes / _MIB for sample in samples],
        "file descriptors": [sample.num_fds for sample in samples],
        "threads": [sample.num_threads for sample in samples],
        "pending items": [sample.pending_items for sample in samples],
    }
    figure, axes = pyplot.subplots(len(panels), 1, sharex=True, figsize=(8, 7), layout="constrained")
    for axis, (label, values) in zip(axes, panels.items(), strict=True):
        axis.plot(minutes, values, linewidth=1)
        axis.set_ylabel(label)
        axis.set_ylim(bottom=0)
        axis.grid(alpha=0.3)
    axes[-1].set_xlabel("minutes")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


async def _soak(traffic: Traffic, seed: int) -> list[Sample]:
    """All clients at once, sampled all the while."""
    samples: list[Sample] = []
    clients: Sequence[Awaitable[None]] = (
        *(_keep_alive(traffic, f"mixed {number}") for number in range(3)),
        _repeat(traffic, "bad input", _bad_input(seed)),
        _repeat(traffic, "cancelled", _cancelled),
        _repeat(traffic, "slow", _slow),
        _repeat(traffic, "slow and gone", _slow_and_gone),
        _bursts(traffic),
        _sample(traffic, samples),
    )
    await asyncio.gather(*clients)
    return samples


async def _keep_alive(traffic: Traffic, client: str) -> None:
    """Good requests of every kind, one after the other on connections that are kept."""
    while traffic.goes_on:
        try:
            connection = await Connection.open(traffic.service.url)
        except OSError:
            await asyncio.sleep(0.1)
            continue
        while traffic.goes_on:
            answer = await connection.exchange(mixed_request(traffic.inputs, traffic.rng))
            traffic.count(client, answer)
            if answer.status in (429, 503):
                await asyncio.sleep(0.2)
            if answer.ends_connection:
                break
        connection.close()


Client = Callable[[Traffic], Awaitable[Answer | None]]


async def _repeat(traffic: Traffic, name: str, client: Client) -> None:
    while traffic.goes_on:
        answer = await client(traffic)
        if answer is not None:
            traffic.count(name, answer)
        await asyncio.sleep(traffic.rng.uniform(0, 0.1))


def _bad_input(seed: int) -> Client:
    """Cases of the fuzz that say truly where they end."""
    numbers = iter(range(2**31))

    async def send(traffic: Traffic) -> Answer | None:
        case = make_case(traffic.inputs, seed, next(numbers))
        if not case.framed or case.is_head:
            return None
        return await exchange(traffic.service.url, case.message)

    return send


async def _cancelled(traffic: Traffic) -> None:
    """A whole request whose client closes before the answer."""
    with suppress(OSError):
        connection = await Connection.open(traffic.service.url)
        await connection.send(mixed_request(traffic.inputs, traffic.rng))
        await asyncio.sleep(traffic.rng.uniform(0, 0.3))
        (connection.abort if traffic.rng.random() < 0.5 else connection.close)()


async def _slow(traffic: Traffic, share: float = 1.0) -> Answer | None:
    """A request in pieces with pauses."""
    message = encode_request(traffic.rng.choice(traffic.inputs.photos))
    message = message[: round(share * len(message))]
    step = len(message) // 8 + 1
    try:
        connection = await Connection.open(traffic.service.url)
    except OSError:
        return None
    for start in range(0, len(message), step):
        await connection.send(message[start : start + step])
        await asyncio.sleep(traffic.rng.uniform(0.01, 0.3))
    answer = await connection.receive() if share == 1 else None
    connection.close()
    return answer


async def _slow_and_gone(traffic: Traffic) -> None:
    """The same, given up on the way."""
    await _slow(traffic, traffic.rng.uniform(0.01, 0.95))


async def _warm(traffic: Traffic) -> None:
    """Enough of every kind at once that each pool has all its threads."""
    await _burst(traffic)
    requests = [mixed_request(traffic.inputs, traffic.rng) for _ in range(_WARMUP)]
    await asyncio.gather(*(exchange(traffic.service.url, message) for message in requests))


async def _bursts(traffic: Traffic) -> None:
    while traffic.goes_on:
        await _burst(traffic)
        await asyncio.sleep(min(_BURST_EVERY_S, max(0.0, traffic.until_s - time.monotonic())))


async def _burst(traffic: Traffic) -> None:
    """More requests at once than the queue takes."""
    messages = [encode_request(traffic.rng.choice(traffic.inputs.photos)) for _ in range(_BURST)]
    answers = await asyncio.gather(*(exchange(traffic.service.url, message) for message in messages))
    for answer in answers:
        traffic.count("burst", answer)


async def _sample(traffic: Traffic, samples: list[Sample]) -> None:
    started_s = time.monotonic()
    while traffic.goes_on:
        sample = await asyncio.to_thread(_look, traffic.service, time.monotonic() - started_s)
        if sample is not None:
            samples.append(sample)
        await asyncio.sleep(_SAMPLE_S)


def _look(service: Service, seconds: float) -> Sample | None:
    """The service now; None where it did not answer."""
    try:
        metrics = service.metrics()
    except httpx.HTTPError:
        return None
    gauges = {name: value for (name, _), value in metrics.items()}
    return Sample(
        seconds,
        service.rss_bytes(),
        service.num_fds(),
        service.num_threads(),
        gauges.get("drorae_pending_items", 0.0),
        gauges.get("drorae_queue_items", 0.0),
    )


async def _settled(service: Service) -> Sample | None:
    """The service once nothing is pending and its descriptors stand still, or as it is after a while."""
    limit_s, last = time.monotonic() + _SETTLE_S, None
    while service.alive and time.monotonic() < limit_s:
        await asyncio.sleep(_SAMPLE_S)
        sample = await asyncio.to_thread(_look, service, 0.0)
        still = last is not None and sample is not None and sample.num_fds == last.num_fds
        if sample is not None and still and sample.pending_items == sample.queue_items == 0:
            return sample
        last = sample or last
    return last


def _report_traffic(findings: Findings, traffic: Traffic) -> None:
    by_status: Counter[int] = Counter()
    for (_, status), number in traffic.outcomes.items():
        by_status[status] += number
    findings.report("requests answered or lost", by_status.total())
    for status, number in sorted(by_status.items()):
        findings.report(f"status {status or 'none'}", number)
    findings.exactly("answers 5xx", sum(n for status, n in by_status.items() if status >= 500), 0)
    findings.exactly("requests without an answer", by_status[0], 0)
    shown = {f"{name} {status}": number for (name, status), number in sorted(traffic.outcomes.items())}
    logger.info("soak: %s", json.dumps(shown))


def _report_state(
    findings: Findings, samples: Sequence[Sample], before: Sample | None, after: Sample | None
) -> None:
    findings.report("samples", len(samples))
    findings.at_most("growth of resident memory over the last two thirds", growth(samples), MAX_GROWTH)
    if before is None or after is None:
        findings.exactly("states seen before and after", 0, 1)
        return
    findings.report("resident memory before, MiB", before.rss_bytes / _MIB)
    findings.report("resident memory at most, MiB", max((s.rss_bytes for s in samples), default=0) / _MIB)
    findings.report("resident memory after, MiB", after.rss_bytes / _MIB)
    findings.at_most("file descriptors left over", after.num_fds - before.num_fds, 0)
    findings.at_most("threads left over", after.num_threads - before.num_threads, 0)
    findings.exactly("pending items afterwards", after.pending_items, 0)
    findings.exactly("queued items afterwards", after.queue_items, 0)
