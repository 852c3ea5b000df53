"""Sweeps: real tiny runs of phase 2, resumed and repeated, and fits against numpy."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest
import yaml

from model.config import fusion_num_parameters
from model.tokenizer import Tokenizer
from tests.training.conftest import TINY_FUSION
from training.data.sources import list_samples
from training.errors import RankError, RecipeError, TrainingError
from training.evaluation.evaluate import evaluate_tokenizer
from training.phases.trainer import Trainer
from training.run import run_phase
from training.studies.scaling import SweepPoint, fit_line, fit_scaling
from training.studies.sweep import SweepRecipe, plan_sizes

WIDTH = 32  # of the tiny encoder


@pytest.fixture
def sweep_file(recipe_file: Path) -> Path:
    """Two widths and two layer counts around the tiny fusion, two steps each."""
    recipe = yaml.safe_load(recipe_file.read_text())
    recipe |= {
        "widths": [16, TINY_FUSION.hidden_width],
        "layer_counts": [2, TINY_FUSION.num_layers],
        "extra_seeds": [5],
        "num_steps": 2,
        "noise_tau": 0.0,
        "checkpoint_every_steps": 1,
    }
    recipe["loss"] |= {"adversarial": 0.0}
    recipe_file.write_text(yaml.safe_dump(recipe))
    return recipe_file


def sizes_of(directory: Path) -> list[tuple[int, int, int]]:
    with (directory / "sweep.csv").open() as stream:
        columns = ("num_layers", "hidden_width", "seed")
        return [tuple(int(row[name]) for name in columns) for row in csv.DictReader(stream)]


@pytest.mark.parametrize(("slope", "noise"), [(-0.058, 0.0), (2.5, 0.3)])
def test_fit_is_numpys(slope: float, noise: float) -> None:
    rng = np.random.default_rng(0)
    x = np.log10([fusion_num_parameters(12, 768, h) for h in (128, 256, 512, 1536, 3072, 6144)])
    y = slope * x + 0.97 + noise * rng.normal(size=len(x))
    fit = fit_line(x.tolist(), y.tolist())
    (expected_slope, intercept), covariance = np.polyfit(x, y, 1, cov=True)
    assert fit.slope == pytest.approx(expected_slope, rel=1e-9)
    assert fit.intercept == pytest.approx(intercept, rel=1e-9)
    assert fit.r_squared == pytest.approx(np.corrcoef(x, y)[0, 1] ** 2, rel=1e-9)
    assert fit.slope_error == pytest.approx(covariance[0, 0] ** 0.5, rel=1e-6, abs=1e-9)


def test_fit_of_the_degenerate() -> None:
    flat = fit_line([1, 2, 3], [4, 4, 4])
    assert (flat.slope, flat.r_squared) == (0, None)
    assert fit_line([1, 2], [0, 1]).slope_error is None
    with pytest.raises(ValueError, match="two different x"):
        fit_line([2, 2], [0, 1])


def test_scaling_fits_each_axis_alone() -> None:
    def point(num_layers: int, width: int, psnr_db: float, seed: int = 0) -> SweepPoint:
        parameters = fusion_num_parameters(num_layers, WIDTH, width)
        return SweepPoint(num_layers, width, seed, parameters, {"psnr_db": psnr_db}, 1)

    def law(width: int) -> float:
        return 3 * float(np.log10(fusion_num_parameters(4, WIDTH, width)))

    widths = [point(4, width, law(width)) for width in (8, 16, 64)]
    centre = widths[1]
    layers = [point(2, 16, law(16) - 1), point(1, 16, law(16) - 1.5)]
    repeats = [point(4, 16, law(16) + 0.2, seed=1)]
    scaling = fit_scaling([*layers, *widths, *repeats], centre)
    width_fit, layer_fit = scaling.fits["width"]["psnr_db"], scaling.fits["layers"]["psnr_db"]
    assert (width_fit.slope, width_fit.r_squared, width_fit.num_points) == pytest.approx((3, 1, 3))
    assert (layer_fit.slope, layer_fit.r_squared, layer_fit.num_points) == pytest.approx((0.5, 1, 3))
    assert scaling.deviations == {"psnr_db": pytest.approx(0.2 / 2**0.5)}


def test_sweep_trains_every_size_alike_and_reports(
    sweep_file: Path, encoder_checkpoint: Path, photos: Path, tmp_path: Path
) -> None:
    output = tmp_path / "sweep"
    assert run_phase("sweep", sweep_file, ["num_processes=2"], output) == 0
    assert sizes_of(output) == [(2, 48, 0), (4, 16, 0), (4, 48, 0), (4, 48, 5)]
    summary = json.loads((output / "sweep.json").read_text())
    for point in summary["points"]:
        run = output / "points" / "layers{num_layers:02d}-width{hidden_width:04d}-seed{seed}".format(**point)
        tokenizer = Tokenizer.load(run / "checkpoint")
        assert sum(p.numel() for p in tokenizer.fusion.parameters()) == point["num_parameters"]
        report = evaluate_tokenizer(tokenizer, list_samples([photos]), progress=False)
        assert report.psnr_db == pytest.approx(point["figures"]["psnr_db"], abs=1e-3)
        assert report.ssim == pytest.approx(point["figures"]["ssim"], abs=1e-4)
        assert point["figures"]["frechet_efficientnet_lite0"] > 0
        recipe = json.loads((run / "recipe.json").read_text())
        assert (recipe["num_steps"], recipe["batch_size"]) == (2, 4)
    base = evaluate_tokenizer(Tokenizer.load(encoder_checkpoint), list_samples([photos]), progress=False)
    assert summary["baseline"]["psnr_db"] == pytest.approx(base.psnr_db, abs=1e-3)
    two_widths = summary["fits"]["width"]["psnr_db"]
    assert two_widths["num_points"] == 2
    rise = summary["points"][2]["figures"]["psnr_db"] - summary["points"][1]["figures"]["psnr_db"]
    assert np.sign(two_widths["slope"]) == np.sign(rise)
    assert (output / "sweep.png").read_bytes().startswith(b"\x89PNG")
    table = (output / "sweep.md").read_text()
    assert "| 4 | 48 | 5 |" in table
    assert "| no fusion |" in table
    assert "| Frechet, EfficientNet-Lite0 |" in table


def test_stopped_sweep_goes_on_where_it_was(
    sweep_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output, whole = tmp_path / "sweep", tmp_path / "whole"
    overrides = ["extra_seeds=[]"]
    trained, save_state = [], Trainer._save_state

    def save_and_stop(trainer: Trainer, step: int) -> None:
        save_state(trainer, step)
        trained.append((trainer.output.name, step))
        if len(trained) == 3:  # in the middle of the second point
            raise KeyboardInterrupt

    monkeypatch.setattr(Trainer, "_save_state", save_and_stop)
    with pytest.raises(KeyboardInterrupt):
        run_phase("sweep", sweep_file, overrides, output)
    with pytest.raises(TrainingError, match="holds a sweep: continue it with --resume"):
        run_phase("sweep", sweep_file, overrides, output)
    with pytest.raises(RecipeError, match="field 'batch_size' differs"):
        run_phase("sweep", sweep_file, [*overrides, "batch_size=2"], output, resume=True)
    run_phase("sweep", sweep_file, overrides, output, resume=True)
    first, second, third = "layers02-width0048-seed0", "layers04-width0016-seed0", "layers04-width0048-seed0"
    assert trained == [(first, 1), (first, 2), (second, 1), (second, 2), (third, 1), (third, 2)]
    run_phase("sweep", sweep_file, overrides, whole)
    figures = [
        [point["figures"] for point in json.loads((path / "sweep.json").read_text())["points"]]
        for path in (output, whole)
    ]
    assert figures[0] == figures[1]


def test_a_sweep_is_no_launched_run(
    sweep_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every rank would train every point."""
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "0")
    with pytest.raises(RankError, match="without torchrun"):
        run_phase("sweep", sweep_file, [], tmp_path / "sweep")


def test_sizes_are_planned_once_each(sweep_file: Path) -> None:
    recipe = SweepRecipe(**yaml.safe_load(sweep_file.read_text()))
    tiny = Tokenizer.load(recipe.init).config.encoder
    recipe = recipe.model_copy(update={"widths": [16, 64], "layer_counts": [1, 2], "extra_seeds": [3]})
    sizes = [(s.num_layers, s.hidden_width, s.seed) for s in plan_sizes(recipe, TINY_FUSION, tiny)]
    assert sizes == [(1, 48, 0), (2, 48, 0), (4, 16, 0), (4, 48, 0), (4, 64, 0), (4, 48, 3)]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("widths=[16]", "field 'widths'"),
        ("widths=[16, 16]", "names a value twice"),
        ("extra_seeds=[0]", "holds the seed of every point"),
        ("layer_counts=[2, 5]", "field 'layer_counts': 5 exceeds the encoder's 4 blocks"),
        ("fusion.mixer=cross_attention", "field 'fusion.mixer'"),
        ("fusion=null", "field 'fusion'"),
        ("init=null", "field 'init'"),
    ],
)
def test_impossible_sweeps_are_refused_before_anything_is_written(
    override: str, message: str, sweep_file: Path, tmp_path: Path
) -> None:
    with pytest.raises(RecipeError, match=message):
        run_phase("sweep", sweep_file, [override], tmp_path / "sweep")
    assert not (tmp_path / "sweep").exists()
