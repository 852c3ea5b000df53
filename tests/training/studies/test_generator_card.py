from pathlib import Path

import pytest
from PIL import Image

from tests.training.conftest import encode_png, make_image
from training.errors import DataError
from training.studies.generator_card import SIDE, class_row, draw_samples, plot_training


def write_samples(folder: Path, names: list[str], count: int) -> Path:
    for number, name in enumerate(names):
        (folder / name).mkdir(parents=True)
        for index in range(count):
            (folder / name / f"{index:06d}.png").write_bytes(encode_png(make_image(number * count + index)))
    return folder


def test_every_class_has_a_row_of_samples(tmp_path: Path) -> None:
    samples = write_samples(tmp_path / "samples", ["ant", "be_e"], 3)
    draw_samples(samples, ["ant", "be/e"], tmp_path / "grid.jpg", columns=2)
    with Image.open(tmp_path / "grid.jpg") as grid:
        assert grid.width > 2 * SIDE
        assert grid.height > 2 * SIDE
        assert len(grid.convert("RGB").getcolors(1 << 20) or []) > 100  # pictures are in it
    with pytest.raises(DataError, match="ant"):
        class_row(samples / "ant", 4)


def test_the_curve_shows_both_losses(tmp_path: Path) -> None:
    for table in ("train.csv", "validation.csv"):
        (tmp_path / table).write_text("step,loss\n10,2.0\n20,1.0\n")
    plot_training(tmp_path, tmp_path / "curve.png")
    with Image.open(tmp_path / "curve.png") as figure:
        assert figure.width == 700
    with pytest.raises(DataError, match=r"train\.csv"):
        plot_training(tmp_path / "none", tmp_path / "curve.png")
