"""Benchmarks small enough for a test."""

import csv
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from benchmarks.harness import timing

Run = Callable[..., list[dict[str, str]]]


@pytest.fixture
def small_ceilings(monkeypatch: pytest.MonkeyPatch) -> None:
    """The device's ceilings are measured in milliseconds instead of seconds."""
    monkeypatch.setattr(timing, "MATRIX_SIDES", {"cpu": (64, 128), "cuda": (256,)})
    monkeypatch.setattr(timing, "COPY_BYTES", {"cpu": 2**16, "cuda": 2**20})


@pytest.fixture
def run(small_ceilings: None, tmp_path: Path) -> Run:
    """Runs a script's main and gives the rows that it appended."""

    def run(main: Callable[[Sequence[str]], int], *arguments: str, status: int = 0) -> list[dict[str, str]]:
        path = tmp_path / "results.csv"
        assert main([*arguments, "--output", str(path)]) == status
        if not path.exists():
            return []
        with path.open(newline="", encoding="utf-8") as stream:
            return list(csv.DictReader(stream))

    return run
