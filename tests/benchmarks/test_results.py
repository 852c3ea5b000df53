"""CSV files of results, and the table."""

from dataclasses import dataclass
from pathlib import Path

import pytest

from benchmarks.harness.results import ResultsError, append_rows, check_columns, format_table, ratio


@dataclass(frozen=True)
class Row:
    name: str
    p50_ms: float
    speedup: float | None = None


def test_appends_under_one_header(tmp_path: Path) -> None:
    path = tmp_path / "new" / "results.csv"
    append_rows(path, [Row("first, with a comma", 1 / 3)])
    append_rows(path, [Row("second", 20, 1.5), Row("third", 1e-7)])
    assert path.read_text(encoding="utf-8").splitlines() == [
        "name,p50_ms,speedup",
        '"first, with a comma",0.333333,',
        "second,20,1.5",
        "third,1e-07,",
    ]


def test_nothing_to_append_makes_no_file(tmp_path: Path) -> None:
    append_rows(tmp_path / "results.csv", [])
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("header", "difference"),
    [
        ("name,p50_ms", "missing: speedup"),
        ("name,p50_ms,speedup,error", "unknown: error"),
        ("name,p50,speedup", "missing: p50_ms; unknown: p50"),
        ("p50_ms,name,speedup", "another order"),
    ],
)
def test_refuses_a_file_with_other_columns(tmp_path: Path, header: str, difference: str) -> None:
    path = tmp_path / "results.csv"
    path.write_text(f"{header}\n1,2,3\n", encoding="utf-8")
    for refuse in (lambda: check_columns(path, Row), lambda: append_rows(path, [Row("a", 1)])):
        with pytest.raises(ResultsError, match=f"has other columns .{difference}"):
            refuse()
    assert path.read_text(encoding="utf-8") == f"{header}\n1,2,3\n"


def test_an_empty_file_will_do(tmp_path: Path) -> None:
    path = tmp_path / "results.csv"
    path.touch()
    append_rows(path, [Row("a", 1)])
    assert path.read_text(encoding="utf-8").splitlines()[0] == "name,p50_ms,speedup"


def test_table() -> None:
    columns = {"name": lambda row: row.name, "p50 ms": lambda row: row.p50_ms, "x": lambda row: row.speedup}
    assert format_table([Row("definition", 1234.5678), Row("folded", 12, 102.88)], columns).splitlines() == [
        "name        p50 ms      x",
        "definition    1235      -",
        "folded          12  102.9",
    ]


def test_ratio_of_what_was_not_measured() -> None:
    assert ratio(3.0, 2.0) == 1.5
    assert ratio(None, 2.0) is None
    assert ratio(3.0, None) is None
