"""Latent statistics: against two passes, over ranks, after a kill, and in a checkpoint."""

import json
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from model.images.files import fit_picture
from model.images.tensors import to_tensor
from model.tokenizer import Tokenizer
from tests.training.conftest import TINY, TINY_FUSION, launch, make_image
from training.data.batches import decode_image
from training.data.sources import list_samples
from training.errors import DataError, TrainingError
from training.evaluation.latent_statistics import StatisticsOptions, latent_statistics, statistics_command


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    torch.manual_seed(3)
    tokenizer = Tokenizer(TINY.model_copy(update={"fusion": TINY_FUSION}))
    return tokenizer.save(tmp_path / "checkpoint", torch.float16, {"phase": "phase2", "steps": 7}).path


@pytest.fixture
def bright(tmp_path: Path) -> Path:
    """Thirteen nearly white pictures, one broken file among them."""
    folder = tmp_path / "bright"
    folder.mkdir()
    for index in range(13):
        pixels = 235 + np.asarray(make_image(index)) // 13
        Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{index:02d}.png")
    (folder / "05x.png").write_bytes(b"text")
    return folder


def two_pass(checkpoint: Path, folder: Path) -> tuple[torch.Tensor, torch.Tensor]:
    files = [file for file in sorted(folder.glob("*.png")) if file.stat().st_size > 10]
    images = torch.stack([to_tensor(fit_picture(decode_image(f.read_bytes()), 32)) for f in files])
    latents = Tokenizer.load(checkpoint).encode(images).double()
    return latents.mean(dim=0), latents.var(dim=0, correction=0)


def stored(path: Path) -> dict[str, torch.Tensor]:
    return {name: t.double() for name, t in load_file(path / "statistics.safetensors").items()}


def test_stored_statistics_equal_two_passes(checkpoint: Path, bright: Path, tmp_path: Path) -> None:
    target = tmp_path / "new"
    options = StatisticsOptions(str(checkpoint), [bright], target, batch_size=4, device="cpu")
    assert statistics_command(options) == 0
    mean, var = two_pass(checkpoint, bright)
    torch.testing.assert_close(stored(target)["mean"], mean, rtol=0, atol=1e-6)
    torch.testing.assert_close(stored(target)["var"], var, rtol=0, atol=1e-6)
    assert not list(tmp_path.glob(".*")), "nothing is left beside the checkpoint"


def test_normalized_latents_have_mean_0_and_variance_1(checkpoint: Path, photos: Path) -> None:
    statistics_command(StatisticsOptions(str(checkpoint), [photos], checkpoint, device="cpu"))
    files = sorted(photos.glob("*.png"))
    images = torch.stack([to_tensor(fit_picture(decode_image(f.read_bytes()), 32)) for f in files])
    tokenizer = Tokenizer.load(checkpoint)
    latents = tokenizer.encode(images, normalize=True).double()
    assert tokenizer.latent_var is not None
    shrunk = tokenizer.latent_var / (tokenizer.latent_var + 1e-5)
    assert latents.mean(dim=0).abs().max() < 1e-4
    torch.testing.assert_close(latents.var(dim=0, correction=0), shrunk.double(), rtol=1e-4, atol=1e-6)
    assert (shrunk > 0.99).float().mean() > 0.9


def test_a_checkpoint_keeps_weights_and_provenance(checkpoint: Path, photos: Path, tmp_path: Path) -> None:
    names = ("encoder", "fusion", "decoder")
    before = {name: (checkpoint / f"{name}.safetensors").read_bytes() for name in names}
    config = json.loads((checkpoint / "config.json").read_text())
    for target in (checkpoint, tmp_path / "other"):
        statistics_command(StatisticsOptions(str(checkpoint), [photos], target, device="cpu"))
        assert before == {name: (target / f"{name}.safetensors").read_bytes() for name in names}
        after = json.loads((target / "config.json").read_text())
        statistics = after["provenance"].pop("statistics")
        assert after["provenance"] == config["provenance"]
        assert after["tokenizer"] == config["tokenizer"]
        assert statistics["num_images"] == 12
        assert Tokenizer.load(target).has_statistics


@pytest.mark.parametrize("size", [2, 3])
def test_ranks_give_what_one_rank_gives(checkpoint: Path, bright: Path, tmp_path: Path, size: int) -> None:
    result = launch(
        "stats", size, checkpoint=checkpoint, data=[bright], output=tmp_path / "new", batch_size=2
    )
    assert result.returncode == 0, result.stderr
    summary = json.loads(result.stdout)  # one rank prints
    assert summary["num_images"] == 13
    assert summary["num_broken_images"] == 1
    mean, var = two_pass(checkpoint, bright)
    torch.testing.assert_close(stored(tmp_path / "new")["mean"], mean, rtol=0, atol=1e-6)
    torch.testing.assert_close(stored(tmp_path / "new")["var"], var, rtol=0, atol=1e-6)


def test_a_killed_run_goes_on(
    checkpoint: Path, bright: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "new"
    options = {"checkpoint": checkpoint, "data": [bright], "output": target, "batch_size": 2}
    result = launch("stats", 1, kill_at=4, save_every_s=0.0, **options)
    assert result.returncode == signal.SIGKILL, result.stderr
    assert not target.exists()
    num_encoded = 0
    encode = Tokenizer.encode

    def counted(self: Tokenizer, images: torch.Tensor) -> torch.Tensor:
        nonlocal num_encoded
        num_encoded += len(images)
        return encode(self, images)

    with monkeypatch.context() as patch:
        patch.setattr(Tokenizer, "encode", counted)
        statistics_command(StatisticsOptions(str(checkpoint), [bright], target, batch_size=2, device="cpu"))
    assert num_encoded == 13 - 6, "three batches of two were kept, the broken one comes later"
    mean, var = two_pass(checkpoint, bright)
    torch.testing.assert_close(stored(target)["mean"], mean, rtol=0, atol=1e-6)
    torch.testing.assert_close(stored(target)["var"], var, rtol=0, atol=1e-6)
    assert not list(tmp_path.glob(".*"))


def test_unfinished_work_of_other_data_is_refused(checkpoint: Path, bright: Path, photos: Path) -> None:
    launch("stats", 1, kill_at=2, save_every_s=0.0, checkpoint=checkpoint, data=[bright], output=checkpoint,
           batch_size=2)  # fmt: skip
    with pytest.raises(TrainingError, match=r"unfinished run with other data.*delete the directory"):
        statistics_command(StatisticsOptions(str(checkpoint), [photos], checkpoint, device="cpu"))


def test_refusals(checkpoint: Path, tmp_path: Path, photos: Path) -> None:
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "a.png").write_bytes(b"text")
    with pytest.raises(DataError, match="none of the 1 images"):
        statistics_command(StatisticsOptions(str(checkpoint), [broken], checkpoint, device="cpu"))
    from model.checkpoints.tokenizers import BUNDLED_DIRECTORY

    mini = BUNDLED_DIRECTORY / "mini"
    with pytest.raises(TrainingError, match="mini is bundled"):
        statistics_command(StatisticsOptions("mini", [photos], mini, device="cpu"))


def test_a_limit_spreads_over_the_data(checkpoint: Path, photos: Path) -> None:
    tokenizer = Tokenizer.load(checkpoint)
    files = [sorted(photos.glob("*.png"))[index] for index in (0, 3, 6, 9)]
    images = torch.stack([to_tensor(fit_picture(decode_image(f.read_bytes()), 32)) for f in files])
    mean, _ = latent_statistics(tokenizer, list_samples([photos]), limit=4)
    torch.testing.assert_close(mean, tokenizer.encode(images).mean(dim=0), rtol=0, atol=1e-6)
