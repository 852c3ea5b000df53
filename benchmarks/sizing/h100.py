"""What the model says of a node with one H100: rates by cores, and where latency leaves its plateau."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.sizing.costs import H100, HostCosts
from benchmarks.sizing.simulation import Machine, Outcome, Traffic, simulate

CORES = (2, 4, 8, 16, 32, 64)
ENOUGH = 0.85
"""Share of the GPU's rate with full batches that counts as fed."""
KNEE = 3.0
"""Times the unloaded median, where p99 counts as too late."""
_IN_FLIGHT = 512
_SHARES = tuple(share / 100 for share in range(30, 100, 5))


@dataclass(frozen=True)
class Case:
    """A kind of request.

    Attributes:
        operation: of the device.
        photo: size of the files; empty for tensors.
        picture: format of the answer; empty for tensors.
        images_per_request: of each.
    """

    operation: str
    photo: str
    picture: str
    images_per_request: int

    def __str__(self) -> str:
        sent = f"JPEG {self.photo}" if self.photo else "latents" if self.operation == "decode" else "tensors"
        answer = self.picture.upper() or "latents"
        return f"{self.operation}, {sent} to {answer}, {self.images_per_request} per request"


CASES = (
    Case("encode", "256x256", "", 1),
    Case("encode", "256x256", "", 16),
    Case("encode", "500x375", "", 16),
    Case("encode", "1920x1440", "", 16),
    Case("encode", "4000x3000", "", 4),
    Case("decode", "", "png", 1),
    Case("decode", "", "png", 16),
    Case("decode", "", "jpeg", 16),
)


@dataclass(frozen=True)
class CaseRow:
    """A kind of request on nodes of several sizes.

    Attributes:
        rates: images per second, by cores.
        limits: busiest station, by cores.
        cores: fewest that feed the GPU; None where `CORES` are too few.
        knee_per_s: images per second up to which p99 stays below `KNEE` times the unloaded median, with
            the most cores.
    """

    case: Case
    rates: dict[int, float]
    limits: dict[int, str]
    cores: int | None
    knee_per_s: float


def rows_of_cases(host: HostCosts, num_requests: int, num_fronts: int) -> Iterator[CaseRow]:
    """Every kind of request on every number of cores, by runs of so many requests."""
    largest = node(CORES[-1], num_fronts)
    for case in CASES:
        outcomes = {cores: _saturated(host, case, node(cores, num_fronts), num_requests) for cores in CORES}
        rates = {cores: outcome.images_per_s for cores, outcome in outcomes.items()}
        limits = {cores: outcome.bottleneck for cores, outcome in outcomes.items()}
        size = largest.batch_size
        enough = ENOUGH * size / H100[case.operation].seconds(size)
        cores = next((cores for cores in CORES if rates[cores] >= enough), None)
        knee_per_s = _knee(host, case, largest, rates[CORES[-1]], num_requests)
        yield CaseRow(case, rates, limits, cores, knee_per_s)


def node(num_cores: int, num_fronts: int) -> Machine:
    """The service's defaults on a node with one GPU: a core is left to the GPU's thread."""
    decoders = max(1, num_cores - 1)
    return Machine(num_cores, decoders, num_writers=num_cores * num_fronts, num_fronts=num_fronts)


def _saturated(host: HostCosts, case: Case, machine: Machine, num_requests: int) -> Outcome:
    """A closed loop with enough in flight for several full batches."""
    clients = max(1, _IN_FLIGHT // case.images_per_request)
    return _simulate(host, case, machine, Traffic(clients, 0.0, case.images_per_request), num_requests)


def _knee(host: HostCosts, case: Case, machine: Machine, capacity: float, num_requests: int) -> float:
    """Images per second, with the most cores; 0 where no share of the capacity is fast enough."""
    each = case.images_per_request
    alone_ms = _simulate(host, case, machine, Traffic(1, 0.0, each), 50).p50_ms
    found = 0.0
    for share in _SHARES:
        rate = share * capacity
        random_ms = _simulate(host, case, machine, Traffic(0, rate / each, each), num_requests).p99_ms
        if random_ms > KNEE * alone_ms:
            break
        found = rate
    return found


def _simulate(host: HostCosts, case: Case, machine: Machine, traffic: Traffic, num_requests: int) -> Outcome:
    batch, num_fronts = H100[case.operation], machine.num_fronts
    costs = host.costs(batch, case.photo, case.picture, num_fronts=num_fronts)
    return simulate(machine, costs, traffic, num_requests)


def save_plot(rows: Sequence[CaseRow], file: Path) -> None:
    """Images per second over cores, a line for each kind of request."""
    from matplotlib.figure import Figure  # an extra, which the table does without

    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    for row in rows:
        axes.plot(list(row.rates), list(row.rates.values()), marker="o", label=str(row.case))
    axes.set(
        xscale="log",
        yscale="log",
        xlabel="cores",
        ylabel="images per second",
        title="Model: a node with one H100",
    )
    axes.set_xticks(CORES, [str(cores) for cores in CORES], minor=False)
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=100)
