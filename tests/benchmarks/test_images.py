"""The benchmark of the host's work on images."""

import csv
from pathlib import Path

import pytest

from benchmarks.serving import images


def test_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small = [case for case in images.cases() if "4000" not in case.name]
    monkeypatch.setattr(images, "cases", lambda: small)
    path = tmp_path / "images.csv"
    images.main(["--rounds", "2", "--output", str(path)])
    with path.open(encoding="utf-8") as stream:
        rows = list(csv.DictReader(stream))
    assert [row["case"] for row in rows] == [case.name for case in small]
    for row in rows:
        assert float(row["before_ms"]) > 0
        assert (row["met"] == "") == (row["bar"] == "")


def test_a_missed_bar_shows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(images, "cases", lambda: [images.Case("same", tuple, tuple, bar=1e9)])
    assert images.main(["--rounds", "1"]) == 1
