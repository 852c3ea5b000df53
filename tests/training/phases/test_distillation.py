from pathlib import Path

import pytest
import torch
import yaml

from model.config import PRESETS
from model.tokenizer import Tokenizer
from tests.training.conftest import TINY
from training.data.batches import Batch
from training.distributed.ranks import Ranks
from training.errors import RecipeError
from training.phases.distillation import DistillationTask, _excess_variance, _hint_distance, _label_loss
from training.run import run_phase


@pytest.fixture
def distillation_file(tmp_path: Path, photos: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setitem(PRESETS, "tiny", TINY)
    recipe = {
        "preset": "tiny",
        "output": str(tmp_path / "run"),
        "device": "cpu",
        "data": {"train": [str(photos)], "validation": [str(photos)], "num_workers": 0},
        "num_steps": 5,
        "batch_size": 4,
        "image_size": 14,
        "reserved_width": 8,
        "pixels": 0.5,
        "teacher_image_size": 32,
        "final_image_size": 28,
        "final_steps": 2,
        "final_batch_size": 3,
        "log_every_steps": 1,
        "checkpoint_every_steps": 2,
    }
    file = tmp_path / "phase0.yaml"
    file.write_text(yaml.safe_dump(recipe))
    return file


def test_phase0_gives_an_encoder_without_fusion(distillation_file: Path, tmp_path: Path) -> None:
    run_phase("phase0", distillation_file, [], tmp_path / "run")
    tokenizer = Tokenizer.load(tmp_path / "run" / "checkpoint")
    assert tokenizer.fusion is None
    assert tokenizer.checkpoint is not None
    assert tokenizer.checkpoint.provenance["networks"] == {"teacher": "efficientnet-lite0"}


def test_resumed_phase0_gives_the_same_weights(
    distillation_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_phase("phase0", distillation_file, [], tmp_path / "whole")
    step_once = DistillationTask.train_step

    def dying(self: DistillationTask, step: int, batches: list[Batch]) -> dict[str, float]:
        if step == 4:  # within the final size; the last state is of step 4
            raise KeyboardInterrupt
        return step_once(self, step, batches)

    monkeypatch.setattr(DistillationTask, "train_step", dying)
    with pytest.raises(KeyboardInterrupt):
        run_phase("phase0", distillation_file, [], tmp_path / "cut")
    monkeypatch.setattr(DistillationTask, "train_step", step_once)
    run_phase("phase0", distillation_file, [], tmp_path / "cut", resume=True)
    whole, cut = (Tokenizer.load(tmp_path / name / "checkpoint").state_dict() for name in ("whole", "cut"))
    assert all(torch.equal(whole[name], cut[name]) for name in whole)


def test_a_continued_encoder_starts_where_the_first_one_ended(
    distillation_file: Path, tmp_path: Path
) -> None:
    run_phase("phase0", distillation_file, [], tmp_path / "first")
    init = f"init={tmp_path / 'first' / 'checkpoint'}"
    rates = ["optimizer.learning_rate=1e-12", "optimizer.final_learning_rate=0"]
    still = ["num_steps=1", "final_steps=0", *rates]
    run_phase("phase0", distillation_file, [init, *still], tmp_path / "second")
    first, second = (Tokenizer.load(tmp_path / name / "checkpoint").encoder for name in ("first", "second"))
    for before, after in zip(first.parameters(), second.parameters(), strict=True):
        torch.testing.assert_close(after, before, rtol=0, atol=1e-6)


def test_a_foreign_encoder_is_refused(distillation_file: Path) -> None:
    with pytest.raises(RecipeError, match="field 'init': the encoder of 'mini'"):
        run_phase("phase0", distillation_file, ["init=mini"])


def test_labels_count_where_there_are_some() -> None:
    logits = torch.tensor([[5.0, 0.0], [0.0, 5.0], [0.0, 5.0]])
    right = _label_loss(logits, torch.tensor([0, 1, -1]))
    wrong = _label_loss(logits, torch.tensor([1, 0, -1]))
    assert right < 0.01 < 4 < wrong
    assert _label_loss(logits, torch.tensor([-1, -1, -1])) == 0
    assert _label_loss(None, torch.tensor([0, 1, 1])) == 0


def test_unknown_preset_is_named(distillation_file: Path) -> None:
    with pytest.raises(RecipeError, match="field 'preset': 'huge'"):
        run_phase("phase0", distillation_file, ["preset=huge"])


def test_an_encoder_without_a_class_token_is_refused(distillation_file: Path) -> None:
    with pytest.raises(RecipeError, match="field 'preset': the encoder of 'siglip2-b' has no class token"):
        run_phase("phase0", distillation_file, ["preset=siglip2-b"])


def test_hint_distance_ignores_the_targets_mean_and_meets_at_the_coarser_grid() -> None:
    target = torch.randn(4, 5, 3, 3, generator=torch.Generator().manual_seed(0))
    centred = target - target.mean(dim=(0, 2, 3), keepdim=True)
    finer = centred.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)
    assert _hint_distance(finer, target + 7, Ranks()).item() == pytest.approx(0, abs=1e-5)
    assert _hint_distance(-centred, target, Ranks()).item() == pytest.approx(2, abs=1e-5)


def test_only_the_variance_over_the_limit_is_penalised() -> None:
    values = torch.tensor([[[1.0, 0.1], [1.0, -0.1]]], requires_grad=True)
    excess = _excess_variance(values, 0.25, Ranks())
    assert excess.item() == pytest.approx((1 - 0.25) / 2)
    (gradient,) = torch.autograd.grad(excess, values)
    assert (gradient[..., 0] > 0).all()
    assert (gradient[..., 1] == 0).all()
    assert _excess_variance(values[..., :0], 0.25, Ranks()) == 0
