"""The ablation table, on a tiny tokenizer."""

import json
import sys
from pathlib import Path

import pytest
import torch

from model.tokenizer import Tokenizer
from tests.training.conftest import TINY, TINY_FUSION
from training.studies import ablations


def test_command_writes_every_variant_and_the_lines(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    Tokenizer(TINY.model_copy(update={"fusion": TINY_FUSION})).save(tmp_path / "checkpoint")
    argv = ["--checkpoint", str(tmp_path / "checkpoint"), "--train", str(photos), "--validation", str(photos)]
    argv += ["--output", str(tmp_path / "out"), "--steps", "3", "--images", "12"]
    monkeypatch.setattr(sys, "argv", ["ablations", *argv])
    ablations.main()
    summary = json.loads((tmp_path / "out" / "ablations.json").read_text())
    names = [row["name"] for row in summary["variants"]]
    assert names[:6] == [
        "energy, incremental",
        "softmax, incremental",
        "energy, replace",
        "softmax, replace",
        "cross-attention",
        "joint with the decoder",
    ]
    assert names[6:] == ["width 24", "width 96", "width 1536", "layers 1", "layers 3"]
    table = (tmp_path / "out" / "ablations.md").read_text()
    assert all(f"| {name} |" in table for name in names)
    assert summary["all_layers_db"] > summary["base_db"]
    assert {name: line["num_points"] for name, line in summary["scaling"].items()} == {
        "per_log10_parameters": 4,
        "per_layer": 3,
    }
    assert (tmp_path / "out" / "scaling.png").stat().st_size > 1000
