"""Findings of a fault scenario: quantities, some of them held to a bar."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.harness.provenance import Provenance


@dataclass(frozen=True)
class Options:
    """How the scenarios are run.

    Attributes:
        seed: of everything random.
        quick: small versions, which show that a scenario works and measure little.
        photos: tar or folder of image files; None takes the samples.
        count: bodies of the fuzz, or starts; None takes the scenario's own number.
        minutes: length of the soak; None takes the scenario's own.
        schemathesis: its executable; None looks for it in PATH.
        settings: of the service, by field name, over the scenario's own.
        save: folder for requests that were answered with a 5xx, to be replayed.
        plot: picture of the soak; None draws none.
    """

    seed: int = 0
    quick: bool = False
    photos: Path | None = None
    count: int | None = None
    minutes: float | None = None
    schemathesis: Path | None = None
    settings: Mapping[str, str] = field(default_factory=dict)
    save: Path = Path("fuzz-failures")
    plot: Path | None = None


@dataclass(frozen=True)
class Check:
    """One quantity of a scenario; ``met`` is None where nothing is demanded of it."""

    scenario: str
    quantity: str
    value: float
    bar: str = ""
    met: bool | None = None


@dataclass(frozen=True)
class FaultRow:
    """One line of the results."""

    device: str
    dtype: str
    torch: str
    triton: str
    commit: str
    scenario: str
    quantity: str
    value: float
    bar: str
    met: str


TABLE: Mapping[str, Callable[[FaultRow], object]] = {
    "scenario": lambda row: row.scenario,
    "quantity": lambda row: row.quantity,
    "value": lambda row: row.value,
    "bar": lambda row: row.bar,
    "met": lambda row: row.met,
}


class Findings:
    """Collects the checks of one scenario."""

    def __init__(self, scenario: str) -> None:
        self.scenario = scenario
        self.checks: list[Check] = []

    def report(self, quantity: str, value: float) -> None:
        """Note a quantity of which nothing is demanded."""
        self.checks.append(Check(self.scenario, quantity, float(value)))

    def exactly(self, quantity: str, value: float, wanted: float) -> None:
        """Demand a value."""
        self._demand(quantity, value, f"= {wanted:g}", value == wanted)

    def at_most(self, quantity: str, value: float, limit: float) -> None:
        """Demand no more than the limit; NaN does not pass."""
        self._demand(quantity, value, f"<= {limit:g}", value <= limit)

    def at_least(self, quantity: str, value: float, limit: float) -> None:
        """Demand no less than the limit; NaN does not pass."""
        self._demand(quantity, value, f">= {limit:g}", value >= limit)

    def _demand(self, quantity: str, value: float, bar: str, met: bool) -> None:
        self.checks.append(Check(self.scenario, quantity, float(value), bar, met))


def to_row(check: Check, provenance: Provenance) -> FaultRow:
    """The check as a line of the results."""
    return FaultRow(
        provenance.device,
        provenance.dtype,
        provenance.torch,
        provenance.triton,
        provenance.commit,
        check.scenario,
        check.quantity,
        check.value,
        check.bar,
        "" if check.met is None else "yes" if check.met else "no",
    )
