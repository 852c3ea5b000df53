"""The figures of a run: columns never shift, and what a crash left is repaired."""

import sys
from pathlib import Path

import pytest
from PIL import Image

from training.errors import RecipeError
from training.output.logs import RunLog
from training.output.tables import Table, read_table, write_table


def test_columns_that_change_are_said_and_never_shift(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file, log = tmp_path / "train.csv", RunLog(tmp_path, with_events=False)
    log.append("train", 1, {"l1": 0.5, "perceptual": 0.25, "adversarial": 0.1})
    log.append("train", 2, {"l1": 0.4, "adversarial": 0.2})
    log.append("train", 3, {"l1": 0.3, "adversarial": 0.3})
    assert [record.message for record in caplog.records] == [
        f"{file}, from step 2 on: perceptual is no longer computed; cells stay empty"
    ]
    log.append("train", 4, {"ssim": 0.9, "l1": 0.2, "adversarial": 0.4})
    assert "ssim is new" in caplog.records[-1].message
    assert file.read_text() == (
        "step,l1,perceptual,adversarial,ssim\n1,0.5,0.25,0.1,\n2,0.4,,0.2,\n3,0.3,,0.3,\n4,0.2,,0.4,0.9\n"
    )


@pytest.mark.parametrize(
    ("rest", "steps"),
    [
        (b"2,0.25\n3,0.2", ["1", "2"]),  # cut: 0.2 may have been 0.25
        (b"2,0.25\n3", ["1", "2"]),
        (b"2,0.25\n\n", ["1", "2"]),
        (b"\n\n2,0.25\n", ["1", "2"]),
        (b"2,0.25,0.5\n3,0.2\n", ["1", "3"]),
        (b"\0\0\0\0", ["1"]),
        (b"\0\0\0\0\n2,0.25\n", ["1", "2"]),
        (b"\xff\xfe,1\n", ["1"]),
        (b"x,0.1\n-1,3\n", ["1"]),
    ],
)
def test_what_a_crash_left_is_dropped(tmp_path: Path, rest: bytes, steps: list[str]) -> None:
    file, log = tmp_path / "train.csv", RunLog(tmp_path, with_events=False)
    file.write_bytes(b"step,l1\n1,0.5\n" + rest)
    log.begin(6)
    table = read_table(file)
    assert [row["step"] for row in table.rows] == steps
    assert table.num_damaged == 0


@pytest.mark.parametrize("contents", [b"", b"step", b"step,l1\n", b"\0\0\n1,2\n", b"1,2\n"])
def test_a_table_without_a_whole_header_begins_anew(tmp_path: Path, contents: bytes) -> None:
    file, log = tmp_path / "train.csv", RunLog(tmp_path, with_events=False)
    file.write_bytes(contents)
    log.begin(6)
    assert not file.exists()
    log.append("train", 1, {"l1": 0.5})
    assert file.read_text() == "step,l1\n1,0.5\n"


def test_rows_after_the_saved_step_are_dropped(tmp_path: Path) -> None:
    file = tmp_path / "validation.csv"
    write_table(file, Table(["step", "ssim"], [{"step": str(n), "ssim": "1"} for n in range(1, 6)]))
    RunLog(tmp_path, with_events=False).begin(3)
    assert file.read_text() == "step,ssim\n1,1\n2,1\n3,1\n"


def test_tensorboard_gets_the_same_figures_and_the_pictures(tmp_path: Path) -> None:
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    log = RunLog(tmp_path, with_events=True)
    log.begin(0)
    log.append("train", 1, {"l1": 0.5})
    log.append("train", 2, {"l1": 0.25})
    (tmp_path / "grids").mkdir()
    Image.new("RGB", (8, 4), "red").save(tmp_path / "grids" / "000002.png")
    log.append("validation", 2, {"ssim": 0.75})
    resumed = RunLog(tmp_path, with_events=True)
    resumed.begin(1)
    resumed.append("train", 2, {"l1": 0.125})
    read = events.EventAccumulator(str(tmp_path / "events"))
    read.Reload()
    assert [(point.step, point.value) for point in read.Scalars("train/l1")] == [(1, 0.5), (2, 0.125)]
    assert (tmp_path / "train.csv").read_text() == "step,l1\n1,0.5\n2,0.125\n"


def test_without_tensorboard_the_recipe_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(RecipeError, match=r"drorae\[tensorboard\]"):
        RunLog(tmp_path, with_events=True)
