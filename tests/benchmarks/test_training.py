"""The training benchmark, end to end with the small preset."""

from typing import Any

import pytest
import torch

from benchmarks import training
from benchmarks.cases.training_weights import write_weights
from model.config import PRESETS
from training.losses.adversarial import DINO_NAME, make_backbone
from training.losses.perceptual import LPIPS_NAME, make_perceptual
from training.recipes.recipe import DiscriminatorConfig, LossConfig

MINI = ("--device", "cpu", "--preset", "mini", "--batch", "1", "--repeats", "1", "--networks", "light")


@pytest.mark.slow
def test_a_phase_before_and_after_the_adversarial_loss(run: Any) -> None:
    precision = torch.get_float32_matmul_precision()
    try:
        rows = run(training.main, *MINI, "--implementations", "phase2")
    finally:
        torch.set_float32_matmul_precision(precision)
    assert [(row["phase"], row["losses"]) for row in rows] == [("phase2", "plain"), ("phase2", "adversarial")]
    for row in rows:
        assert float(row["images_per_s"]) == pytest.approx(1e3 / float(row["p50_ms"]), rel=1e-4)
        gflop = float(row["gflop_bfloat16"]) + float(row["gflop_float32"])
        assert float(row["tflops"]) == pytest.approx(gflop * float(row["images_per_s"]) / 1e3, rel=1e-3)
        assert float(row["memory_estimate_gib"]) > 0
        assert row["memory_gib"] == ""  # only a GPU tells
    for plain, adversarial in zip(rows[::2], rows[1::2], strict=True):
        assert float(plain["gflop_float32"]) < float(adversarial["gflop_float32"])


def test_written_weights_are_read_as_published_ones(tmp_path) -> None:
    files = write_weights(tmp_path, PRESETS["mini"], 0)
    loss = LossConfig(perceptual_network="lpips-vgg", vgg_weights=files["vgg"], lpips_weights=files["lpips"])
    assert make_perceptual(loss).name == LPIPS_NAME
    config = DiscriminatorConfig(backbone="dino-vits8", dino_weights=files["dino"])
    assert make_backbone(config, None, PRESETS["mini"]).name == DINO_NAME
