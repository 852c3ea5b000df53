"""The service under load, against a loop that does the same work without it.

Closed loop at saturation against the bare loop, then an open loop: at parts of the capacity, and at ten
times it.
"""

import logging
from collections import defaultdict
from collections.abc import Iterator

from benchmarks.harness.provenance import Provenance
from benchmarks.harness.service import Service, launch
from benchmarks.serving.bare import Variant, run_bare, variants
from benchmarks.serving.client import Load
from benchmarks.serving.report import Bar, ServingRow, images_per_s, row_of_trials, row_without_server
from benchmarks.serving.trials import Options, Trial, median, run_trial

logger = logging.getLogger(__name__)

TARGET = "/encode?format=raw"
CLOSED_BARS = {1: 0.90, 16: 0.95}
"""Least part of the bare loop's rate, by images a request."""
OPEN_SHARES = (0.1, 0.3, 0.5, 0.9)
"""Of the capacity; `STEADY_SHARE` has a bar, these only a place in the plot."""
STEADY_SHARE = 0.7
STEADY_BAR = 3.0
"""Most that p99 may be over the unloaded p50."""
OVERLOAD = 10
MEMORY_BAR = 1.10
"""Most that memory under overload may be over memory before."""
REFUSAL_BAR_MS = 50.0
_NUM_FINALISTS = 2
_SWEEP_SHARE = 0.2


def measure_load(options: Options, provenance: Provenance) -> Iterator[list[ServingRow]]:
    """Rows of one part after the other."""
    finalists = choose_variants(options)
    with launch(options.service_settings) as service:
        closed = list(_closed_loop(options, provenance, service, finalists))
        yield closed
        capacity = next(row.images_per_s for row in closed if row.clients and row.images_per_request == 1)
        yield from _open_loop(options, provenance, service, capacity)


def choose_variants(options: Options) -> list[Variant]:
    """The fastest ways to run the bare loop, by a short run of each."""
    candidates = variants(options.batches)
    if len(candidates) <= _NUM_FINALISTS:
        return candidates
    rates = {}
    for variant in candidates:
        duration_s = _SWEEP_SHARE * options.duration_s
        rates[variant] = run_bare(options.checkpoint, options.folder, variant, duration_s)
        logger.info("bare loop, %s: %.1f images/s", variant, rates[variant])
    return sorted(rates, key=lambda variant: -rates[variant])[:_NUM_FINALISTS]


def _closed_loop(
    options: Options, provenance: Provenance, service: Service, finalists: list[Variant]
) -> Iterator[ServingRow]:
    bare: defaultdict[Variant, list[float]] = defaultdict(list)
    served: defaultdict[int, list[Trial]] = defaultdict(list)
    for number in range(options.rounds):
        for variant in finalists:
            rate = run_bare(options.checkpoint, options.folder, variant, options.duration_s)
            bare[variant].append(rate)
            logger.info("round %d, bare loop, %s: %.1f images/s", number + 1, variant, rate)
        for num_images in CLOSED_BARS:
            trial = run_trial(service, _load(options, service, options.clients, num_images))
            served[num_images].append(trial)
            rate = images_per_s([trial], num_images)
            logger.info("round %d, service, %d images a request: %.1f images/s", number + 1, num_images, rate)
    for variant, rates in bare.items():
        yield row_without_server(provenance, "closed", "bare", str(variant), rates)
    best = max(median(rates) for rates in bare.values())
    for num_images, trials in served.items():
        row = row_of_trials(
            provenance,
            "closed",
            "service",
            trials,
            clients=options.clients,
            images_per_request=num_images,
        )
        yield row.held_to(Bar("bare images/s", row.images_per_s / best, CLOSED_BARS[num_images]))


def _open_loop(
    options: Options, provenance: Provenance, service: Service, capacity: float
) -> Iterator[list[ServingRow]]:
    alone = run_trial(service, _load(options, service, 1, 1))
    unloaded = row_of_trials(provenance, "unloaded", "service", [alone], clients=1)
    logger.info("unloaded: p50 %.1f ms", unloaded.p50_ms or 0)
    yield [unloaded]
    unloaded_ms = unloaded.p50_ms or float("nan")
    for share in sorted((*OPEN_SHARES, STEADY_SHARE)):
        steady = share == STEADY_SHARE
        rate = share * capacity
        duration_s = options.open_duration_s if steady else options.duration_s
        trial = run_trial(service, _arrivals(options, service, rate, duration_s))
        row = _open_row(options, provenance, "open", trial, rate)
        if steady:
            times = (row.p99_ms or float("nan")) / unloaded_ms
            row = row.held_to(Bar("unloaded p50", times, STEADY_BAR, upper=True))
        logger.info("%g of capacity: p50 %.1f ms, p99 %.1f ms", share, row.p50_ms or 0, row.p99_ms or 0)
        yield [row]
    yield _overload(options, provenance, service, OVERLOAD * capacity)


def _overload(options: Options, provenance: Provenance, service: Service, rate: float) -> list[ServingRow]:
    """Every bar has a row of its own, of the same trial."""
    load = _arrivals(options, service, rate, options.open_duration_s, options.deadline_s)
    trial = run_trial(service, load)
    report = trial.report
    answered = max(1, sum(report.statuses.values()))
    refused_ms = report.answer_times[429].p99_ms if 429 in report.answer_times else 0.0
    others = answered - report.num(200, 200) - report.num(429, 429)
    bars = (
        Bar("memory before", trial.rss_peak / trial.rss_before, MEMORY_BAR, upper=True),
        Bar("50 ms, p99 to refuse", refused_ms / REFUSAL_BAR_MS, 1.0, upper=True),
        Bar("accepted, late", report.num_late / max(1, report.num(200, 200)), 0.0, upper=True),
        Bar("answers, neither 200 nor 429", others / answered, 0.0, upper=True),
        Bar("429s, without Retry-After", report.num_without_retry_after / answered, 0.0, upper=True),
    )
    logger.info(
        "%.0f arrivals/s: %.0f answered, %.1f accepted, refused in %.1f ms (p99), errors %s, unsent %d",
        rate,
        answered / report.duration_s,
        report.ok_per_s,
        refused_ms,
        report.errors,
        report.num_unsent,
    )
    row = _open_row(options, provenance, "overload", trial, rate)
    return [row.held_to(bar) for bar in bars]


def _open_row(
    options: Options, provenance: Provenance, scenario: str, trial: Trial, rate: float
) -> ServingRow:
    clients = options.max_connections
    return row_of_trials(provenance, scenario, "service", [trial], clients=clients, offered_per_s=rate)


def _load(options: Options, service: Service, clients: int, num_images: int) -> Load:
    return Load(
        service.url,
        TARGET,
        str(options.folder),
        clients,
        options.duration_s,
        warmup_s=options.warmup_s,
        images_per_request=num_images,
    )


def _arrivals(
    options: Options, service: Service, rate: float, duration_s: float, deadline_s: float = 0.0
) -> Load:
    return Load(
        service.url,
        TARGET,
        str(options.folder),
        options.max_connections,
        duration_s,
        warmup_s=options.warmup_s,
        rate_per_s=rate,
        deadline_s=deadline_s,
    )
