"""The benchmark of ``drorae tokenize`` runs, at a size that measures nothing."""

import csv
from pathlib import Path

import pytest

from benchmarks import latents


@pytest.mark.slow
@pytest.mark.parametrize(
    ("scenario", "flags"),
    [
        ("memory", ["--images", "64"]),
        ("simulated", ["--rounds", "1", "--duration-s", "0.1", "--side", "256"]),
    ],
)
def test_a_scenario_gives_a_row(tmp_path: Path, scenario: str, flags: list[str]) -> None:
    file = tmp_path / "latents.csv"
    assert latents.main([scenario, *flags, "--workers", "1", "--output", str(file)]) in (0, 1)
    with file.open() as stream:
        (row,) = csv.DictReader(stream)
    assert row["scenario"] == scenario
    assert float(row["ratio"]) > 0
