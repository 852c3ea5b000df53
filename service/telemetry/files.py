"""Metrics of several processes: each counts in files, and one of them writes the page for all.

Counters outlive a process that was killed, since its successor goes on in the same files.
"""

import os
from collections.abc import Iterable, Iterator
from pathlib import Path

from prometheus_client import CollectorRegistry, Metric, generate_latest, values
from prometheus_client.multiprocess import MultiProcessCollector, mark_process_dead
from prometheus_client.samples import Sample

FOLDER_VARIABLE = "PROMETHEUS_MULTIPROC_DIR"
"""Names the folder of the files to a process that counts in them."""


def count_in_files(process: str) -> None:
    """Let all metrics that this process makes from now on be counted in the folder's files, by its name."""
    assert FOLDER_VARIABLE in os.environ
    values.ValueClass = values.MultiProcessValue(lambda: process)  # type: ignore[no-untyped-call]


def forget_gauges(process: str, folder: Path) -> None:
    """A process has ended, and nothing is in flight there any more."""
    mark_process_dead(process, str(folder))  # type: ignore[no-untyped-call]


def render_all(registry: CollectorRegistry, folder: Path) -> bytes:
    """A registry's metrics, with those of the same names in the folder's files added."""
    page = CollectorRegistry()
    page.register(_Sums(registry, folder))
    return generate_latest(page)


class _Sums:
    """Collects the sums of a registry's and the files' samples."""

    def __init__(self, registry: CollectorRegistry, folder: Path) -> None:
        self._registry = registry
        self._folder = folder

    def collect(self) -> Iterator[Metric]:
        files = MultiProcessCollector(None, str(self._folder)).collect()  # type: ignore[no-untyped-call]
        in_files = {family.name: family.samples for family in files}
        for family in self._registry.collect():
            summed = Metric(family.name, family.documentation, family.type)
            summed.samples = list(_sum([*family.samples, *in_files.get(family.name, ())]))
            yield summed


def _sum(samples: Iterable[Sample]) -> Iterator[Sample]:
    """Samples of one family; those of the same name and labels become one."""
    sums: dict[tuple[str, tuple[tuple[str, str], ...]], Sample] = {}
    for sample in samples:
        series = sample.name, tuple(sorted(sample.labels.items()))
        before = sums[series].value if series in sums else 0.0
        sums[series] = Sample(sample.name, sample.labels, before + sample.value)
    yield from sums.values()
