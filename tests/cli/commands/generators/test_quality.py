"""``drorae evaluate-generation`` on small sets, without FID's weights."""

import json

import numpy as np
import pytest
from PIL import Image

from tests.cli.conftest import save_photo

CLASSES = ("ant", "bee", "cat")


def save_set(folder, seed, per_class=4):
    """Pictures of one colour per class, with noise, in class folders."""
    rng = np.random.default_rng(seed)
    for number, name in enumerate(CLASSES):
        for index in range(per_class):
            pixels = rng.integers(0, 60, (64, 64, 3), dtype=np.uint8)
            pixels[..., number] += 180
            file = folder / name / f"{index:03d}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(file)
    return folder


@pytest.fixture
def sets(tmp_path):
    return {name: save_set(tmp_path / name, seed) for seed, name in enumerate(("samples", "val", "train"))}


@pytest.fixture
def measure(run, monkeypatch):
    monkeypatch.setattr("torch.hub.get_dir", lambda: "/nowhere")

    def call(*argv):
        outcome = run("evaluate-generation", *argv, "--image-size", 64, "--device", "cpu")
        assert outcome.status == 0, outcome
        return json.loads(outcome.out)

    return call


def test_the_report_has_every_figure_that_needs_no_download(measure, sets, tmp_path):
    report = measure(
        sets["samples"], "--reference", sets["val"], "--train", sets["train"], "--output", tmp_path / "report"
    )
    assert report["num_samples"] == report["num_reference"] == 12
    assert report["frechet_efficientnet_lite0"] > 0
    assert 0 <= report["precision_efficientnet_lite0"] <= 1
    assert 0 <= report["recall_efficientnet_lite0"] <= 1
    assert report["probe_accuracy_of_samples"] == report["probe_accuracy_of_reference"] == 1
    assert set(report["probe_accuracy_of_samples_by_class"]) == set(CLASSES)
    assert report["nearest_training_distance"] > 0
    assert "fid" not in report
    assert report["skipped"]["inception"]
    assert json.loads((tmp_path / "report" / "report.json").read_text()) == report
    assert (tmp_path / "report" / "neighbours.png").is_file()


def test_a_set_against_itself_is_perfect(measure, sets):
    report = measure(sets["samples"], "--reference", sets["samples"], "--train", sets["samples"])
    assert report["frechet_efficientnet_lite0"] == pytest.approx(0, abs=1e-3)
    assert report["precision_efficientnet_lite0"] == report["recall_efficientnet_lite0"] == 1
    assert report["nearest_training_distance"] == pytest.approx(0, abs=1e-3)


def test_labels_that_are_wrong_are_seen(measure, sets):
    (sets["samples"] / "ant").rename(sets["samples"] / "x")
    (sets["samples"] / "bee").rename(sets["samples"] / "ant")
    (sets["samples"] / "x").rename(sets["samples"] / "bee")
    report = measure(sets["samples"], "--reference", sets["val"], "--train", sets["train"])
    assert report["probe_accuracy_of_samples"] == pytest.approx(1 / 3)


def test_adms_files_go_in_and_out(measure, sets, tmp_path):
    report = measure(sets["samples"], "--reference", sets["val"], "--npz", tmp_path / "samples.npz")
    with np.load(tmp_path / "samples.npz") as arrays:
        assert list(arrays) == ["arr_0"]
        assert arrays["arr_0"].shape == (12, 64, 64, 3)
        assert arrays["arr_0"].dtype == np.uint8
    again = measure(tmp_path / "samples.npz", "--reference", sets["val"])
    assert again["frechet_efficientnet_lite0"] == pytest.approx(
        report["frechet_efficientnet_lite0"], rel=1e-3
    )


def test_bad_sets_are_told(refused, sets, tmp_path):
    common = ("--image-size", 64, "--device", "cpu")
    assert "nowhere" in refused("evaluate-generation", "nowhere", "--reference", sets["val"], *common)
    np.savez(tmp_path / "other.npz", mu=np.zeros(3))
    message = refused("evaluate-generation", tmp_path / "other.npz", "--reference", sets["val"], *common)
    assert "arr_0" in message
    (tmp_path / "text.npz").write_text("no arrays")
    refused("evaluate-generation", tmp_path / "text.npz", "--reference", sets["val"], *common)
    save_photo(sets["samples"] / "dog" / "1.png", 0)
    options = ("--reference", sets["val"], "--train", sets["train"])
    outcome = refused_class(refused, sets["samples"], *options, *common)
    assert "'dog' is none of the 3 classes" in outcome


def refused_class(refused, *argv):
    """The sentence after the progress bars."""
    try:
        return refused("evaluate-generation", *argv)
    except AssertionError as exc:
        return str(exc)
