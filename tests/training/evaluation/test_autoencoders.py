"""Autoencoders of diffusers through the reconstruction metrics; small random ones, no download."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL

from model.config import DecoderConfig, EncoderConfig, TokenizerConfig
from model.interop.to_diffusers import export_diffusers
from model.tokenizer import Tokenizer
from training.errors import DataError
from training.evaluation.autoencoders import DiffusersAutoencoder
from training.evaluation.evaluate import EvaluationOptions, evaluate_command

CPU = torch.device("cpu")
pytestmark = pytest.mark.filterwarnings("ignore")  # diffusers' own


@pytest.fixture
def kl_folder(tmp_path: Path) -> Path:
    """A random SD-VAE in small: latents of a quarter of the side."""
    torch.manual_seed(0)
    network = AutoencoderKL(
        block_out_channels=(8, 16, 16),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        latent_channels=4,
        norm_num_groups=4,
        layers_per_block=1,
    )
    network.save_pretrained(tmp_path / "kl")
    return tmp_path / "kl"


def evaluate(capsys: pytest.CaptureFixture[str], **options: Any) -> dict[str, Any]:
    metrics = ("psnr", "ssim", "edge_ratio", "detail")
    assert (
        evaluate_command(EvaluationOptions(checkpoint="unused", device="cpu", metrics=metrics, **options))
        == 0
    )
    report: dict[str, Any] = json.loads(capsys.readouterr().out)
    return report


def test_a_kl_autoencoder_is_measured(
    kl_folder: Path, photos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    report = evaluate(capsys, data=[photos], autoencoder=kl_folder, image_size=32)
    assert report["checkpoint"] == "kl"
    assert report["image_size"] == 32
    assert report["num_images"] == 12
    assert 0 < report["results"]["base"]["psnr_db"] < 40


def test_its_pictures_are_those_of_diffusers(kl_folder: Path) -> None:
    autoencoder = DiffusersAutoencoder(kl_folder, CPU, 32)
    assert autoencoder.config.decoder.patch_size == 4
    images = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    network = AutoencoderKL.from_pretrained(kl_folder).eval()
    with torch.no_grad():
        latents = network.encode(2 * images - 1).latent_dist.mode()
        expected = (network.decode(latents).sample / 2 + 0.5).clamp(0, 1)
    assert torch.allclose(autoencoder.reconstruct(images), expected, atol=1e-6)


def test_an_exported_tokenizer_scores_as_it_does_itself(
    tmp_path: Path, photos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.manual_seed(0)
    config = TokenizerConfig(
        name="small",
        encoder=EncoderConfig(width=64, depth=2, num_heads=1),  # what AutoencoderRAE can be
        fusion=None,
        decoder=DecoderConfig(width=32, depth=1, num_heads=2, mlp_width=64),
    )
    Tokenizer(config).save(tmp_path / "tiny")
    export_diffusers(Tokenizer.load(tmp_path / "tiny"), tmp_path / "exported")
    report = evaluate(capsys, data=[photos], autoencoder=tmp_path / "exported")
    own = {"checkpoint": str(tmp_path / "tiny"), "device": "cpu", "metrics": ("psnr", "ssim")}
    evaluate_command(EvaluationOptions(data=[photos], **own))  # type: ignore[arg-type]
    expected = json.loads(capsys.readouterr().out)["results"]["base"]
    assert report["results"]["base"]["psnr_db"] == pytest.approx(expected["psnr_db"], abs=1e-2)
    assert report["results"]["base"]["ssim"] == pytest.approx(expected["ssim"], abs=1e-3)


@pytest.mark.parametrize(
    ("contents", "words"),
    [
        (None, "cannot be read"),
        ("{", "cannot be read"),
        ("{}", "_class_name"),
        ('{"_class_name": "UNet2DModel"}', "_class_name"),
        ('{"_class_name": "AutoencoderOfTomorrow"}', "has no AutoencoderOfTomorrow"),
        ('{"_class_name": "AutoencoderKL"}', "not a readable AutoencoderKL"),
    ],
)
def test_what_is_none_is_told(contents: str | None, words: str, tmp_path: Path) -> None:
    if contents is not None:
        (tmp_path / "config.json").write_text(contents)
    with pytest.raises(DataError, match=words):
        DiffusersAutoencoder(tmp_path, CPU)
