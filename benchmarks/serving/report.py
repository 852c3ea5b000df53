"""Results of the service under load: rows, a table, two plots."""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.harness.provenance import Provenance
from benchmarks.harness.service import PARTS
from benchmarks.serving.trials import Trial, median

if TYPE_CHECKING:
    from matplotlib.figure import Figure

logger = logging.getLogger(__name__)

_MIB = 2**20


@dataclass(frozen=True)
class ServingRow(Provenance):
    """One system in one scenario; quantities are medians of the rounds, counts their sums."""

    scenario: str
    system: str
    configuration: str
    clients: int
    images_per_request: int
    num_rounds: int
    images_per_s: float
    offered_per_s: float | None = None
    """Arrivals a second of an open loop."""
    p50_ms: float | None = None
    """Of answers with status 200, from when the request was due."""
    p90_ms: float | None = None
    p99_ms: float | None = None
    cpu_ms_per_request: float | None = None
    """All processes of the server."""
    main_cpu_ms_per_request: float | None = None
    """Its first process: the engine, and without fronts the event loop too."""
    fronts_cpu_ms_per_request: float | None = None
    """Its fronts, or a peer's workers."""
    decoders_cpu_ms_per_request: float | None = None
    client_cpu_ms_per_request: float | None = None
    num_200: int = 0
    num_429: int = 0
    num_5xx: int = 0
    num_errors: int = 0
    """Connections refused or cut, answers that never came, requests that found no free connection."""
    num_late: int = 0
    """200s after their deadline."""
    refused_p50_ms: float | None = None
    """Of answers with status 429, from when the request was sent."""
    refused_p99_ms: float | None = None
    rss_before_mib: float | None = None
    rss_peak_mib: float | None = None
    rss_after_mib: float | None = None
    reference: str = ""
    """What the ratio is over."""
    ratio: float | None = None
    bar: float | None = None
    met: bool | None = None

    def held_to(self, bar: "Bar") -> "ServingRow":
        """The row with its bar."""
        return replace(self, reference=bar.reference, ratio=bar.ratio, bar=bar.bound, met=bar.met)


TABLE: Mapping[str, Callable[[ServingRow], object]] = {
    "scenario": lambda row: row.scenario,
    "system": lambda row: row.system,
    "clients": lambda row: row.clients,
    "offered/s": lambda row: row.offered_per_s,
    "images/s": lambda row: row.images_per_s,
    "p50 ms": lambda row: row.p50_ms,
    "p99 ms": lambda row: row.p99_ms,
    "CPU ms": lambda row: row.cpu_ms_per_request,
    "main": lambda row: row.main_cpu_ms_per_request,
    "fronts": lambda row: row.fronts_cpu_ms_per_request,
    "decoders": lambda row: row.decoders_cpu_ms_per_request,
    "429": lambda row: row.num_429,
    "5xx": lambda row: row.num_5xx,
    "errors": lambda row: row.num_errors,
    "ratio": lambda row: row.ratio,
    "over": lambda row: row.reference or None,
    "bar": lambda row: row.bar,
    "met": lambda row: None if row.met is None else "yes" if row.met else "NO",
}


@dataclass(frozen=True)
class Bar:
    """A ratio and where it must be: at least ``bound``, or at most where ``upper``."""

    reference: str
    ratio: float
    bound: float
    upper: bool = False

    @property
    def met(self) -> bool:
        """Whether it is there."""
        return self.ratio <= self.bound if self.upper else self.ratio >= self.bound


def row_of_trials(
    provenance: Provenance,
    scenario: str,
    system: str,
    trials: Sequence[Trial],
    *,
    clients: int,
    images_per_request: int = 1,
    offered_per_s: float | None = None,
    configuration: str = "",
) -> ServingRow:
    """A row of what clients saw of a server."""
    reports = [trial.report for trial in trials]
    accepted = [report.latencies[200] for report in reports if 200 in report.latencies]
    refused = [report.answer_times[429] for report in reports if 429 in report.answer_times]
    parts = {part: median([trial.part_cpu_ms_per_request(part) for trial in trials]) for part in PARTS}
    return ServingRow(
        **vars(provenance),
        scenario=scenario,
        system=system,
        configuration=configuration,
        clients=clients,
        images_per_request=images_per_request,
        offered_per_s=offered_per_s,
        num_rounds=len(trials),
        images_per_s=images_per_s(trials, images_per_request),
        p50_ms=_median([latency.p50_ms for latency in accepted]),
        p90_ms=_median([latency.p90_ms for latency in accepted]),
        p99_ms=_median([latency.p99_ms for latency in accepted]),
        cpu_ms_per_request=median([trial.cpu_ms_per_request for trial in trials]),
        main_cpu_ms_per_request=parts["main"],
        fronts_cpu_ms_per_request=parts["fronts"],
        decoders_cpu_ms_per_request=parts["decoders"],
        client_cpu_ms_per_request=median([trial.client_cpu_ms_per_request for trial in trials]),
        num_200=sum(report.num(200, 200) for report in reports),
        num_429=sum(report.num(429, 429) for report in reports),
        num_5xx=sum(report.num(500, 599) for report in reports),
        num_errors=sum(sum(report.errors.values()) + report.num_unsent for report in reports),
        num_late=sum(report.num_late for report in reports),
        refused_p50_ms=_median([latency.p50_ms for latency in refused]),
        refused_p99_ms=_median([latency.p99_ms for latency in refused]),
        rss_before_mib=trials[0].rss_before / _MIB,
        rss_peak_mib=max(trial.rss_peak for trial in trials) / _MIB,
        rss_after_mib=trials[-1].rss_after / _MIB,
    )


def row_without_server(
    provenance: Provenance, scenario: str, system: str, configuration: str, rates: Sequence[float]
) -> ServingRow:
    """A row of a loop without HTTP, with the images per second of its rounds."""
    return ServingRow(
        **vars(provenance),
        scenario=scenario,
        system=system,
        configuration=configuration,
        clients=0,
        images_per_request=1,
        num_rounds=len(rates),
        images_per_s=median(rates),
    )


def images_per_s(trials: Sequence[Trial], images_per_request: int = 1) -> float:
    """Median over the rounds of the images per second that were answered with status 200."""
    return median([trial.report.ok_per_s * images_per_request for trial in trials])


def save_latency_plot(rows: Sequence[ServingRow], path: Path) -> None:
    """Latency over the offered load, for the rows of scenario ``open``; needs matplotlib."""
    from matplotlib.figure import Figure

    chosen = sorted((row for row in rows if row.scenario == "open"), key=lambda row: row.offered_per_s or 0)
    offered = [row.offered_per_s or 0 for row in chosen]
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.add_subplot()
    for name in ("p50_ms", "p90_ms", "p99_ms"):
        values = [getattr(row, name) or float("nan") for row in chosen]
        axes.plot(offered, values, marker="o", label=name.removesuffix("_ms"))
    axes.set(xlabel="arrivals per second", ylabel="milliseconds from arrival to answer", yscale="log")
    axes.set_title(f"/encode, single images, {chosen[0].device}", fontsize="small")
    axes.grid(alpha=0.3)
    axes.legend()
    _save(figure, path)


def save_host_plot(rows: Sequence[ServingRow], path: Path) -> None:
    """Images a second and CPU time a request of the servers around one device; needs matplotlib."""
    from matplotlib.figure import Figure

    chosen = {
        (row.system, row.clients): row for row in rows if row.scenario == "host"
    }  # a system has a row for each reference
    names = [f"{system}\n{clients} clients" for system, clients in chosen]
    figure = Figure(figsize=(9, 4), layout="constrained")
    rates, costs = figure.subplots(1, 2)
    rates.bar(names, [row.images_per_s for row in chosen.values()], color="tab:blue")
    rates.set_title("images per second", fontsize="small")
    costs.bar(names, [row.cpu_ms_per_request or 0 for row in chosen.values()], color="tab:orange")
    costs.set_title("server CPU milliseconds per request", fontsize="small")
    for axes in (rates, costs):
        axes.grid(axis="y", alpha=0.3)
        axes.tick_params(axis="x", labelsize="x-small")
    _save(figure, path)


def _save(figure: "Figure", path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    logger.info("wrote %s", path)


def _median(values: Sequence[float]) -> float | None:
    return median(values) if values else None
