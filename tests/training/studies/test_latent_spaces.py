from pathlib import Path

import pytest
from PIL import Image

from training.errors import DataError
from training.studies.latent_spaces import plot_losses, smoothed


def write_run(folder: Path, losses: list[float]) -> Path:
    folder.mkdir()
    rows = "".join(f"{10 * (n + 1)},{loss}\n" for n, loss in enumerate(losses))
    for table in ("train.csv", "validation.csv"):
        (folder / table).write_text("step,loss\n" + rows)
    return folder


def test_the_figure_shows_every_run(tmp_path: Path) -> None:
    runs = {
        "base": write_run(tmp_path / "a", [2.0, 1.0, 0.5]),
        "enriched": write_run(tmp_path / "b", [2.0, 0.4]),
    }
    last = plot_losses(runs, tmp_path / "curves.png")
    assert last["base"]["validation"] == last["base"]["best"] == 0.5
    assert last["enriched"]["validation"] == 0.4
    with Image.open(tmp_path / "curves.png") as figure:
        assert figure.width == 1000


def test_smoothing_keeps_a_constant() -> None:
    assert smoothed([3.0, 3.0, 3.0]) == pytest.approx([3.0, 3.0, 3.0])


def test_a_run_without_losses_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"train\.csv"):
        plot_losses({"x": tmp_path}, tmp_path / "curves.png")
