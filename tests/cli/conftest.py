"""Checkpoints and photos for the command line, and a way to run it in this process."""

import os
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from cli.main import main
from model.config import DecoderConfig, EncoderConfig, FusionConfig, TokenizerConfig
from model.tokenizer import Tokenizer

SIDE = 64


@dataclass(frozen=True)
class Outcome:
    """Exit status and what was printed."""

    status: int
    out: str
    err: str


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch):
    """No settings from outside the test."""
    for name in list(os.environ):
        if name.startswith("DRORAE_"):
            monkeypatch.delenv(name)


@pytest.fixture(scope="session")
def drorae() -> str:
    """The installed command."""
    found = shutil.which("drorae", path=Path(sys.executable).parent) or shutil.which("drorae")
    if found is None:
        pytest.skip("the drorae command is not installed")
    return found


@pytest.fixture
def run(capsys) -> Callable[..., Outcome]:
    """Runs ``drorae`` in this process."""

    def call(*argv: object) -> Outcome:
        capsys.readouterr()
        try:
            status = main([str(argument) for argument in argv])
        except SystemExit as exc:  # argparse: --help, or a wrong argument
            status = exc.code
        captured = capsys.readouterr()
        return Outcome(status, captured.out, captured.err)

    return call


@pytest.fixture
def refused(run) -> Callable[..., str]:
    """Runs a command that must fail, with one sentence and no traceback; gives the sentence."""

    def call(*argv: object, status: int = 2) -> str:
        outcome = run(*argv)
        assert outcome.status == status, outcome
        assert outcome.err.count("\n") == 1, outcome.err
        assert outcome.err.startswith("drorae: ")
        assert "Traceback" not in outcome.err
        return outcome.err

    return call


def save_tiny(path: Path, seed: int, with_statistics: bool) -> Path:
    """A random tokenizer of 64-pixel images and latents [32, 4, 4]."""
    torch.manual_seed(seed)
    config = TokenizerConfig(
        name=path.name,
        image_size=SIDE,
        encoder=EncoderConfig(width=32, depth=3, num_heads=2, image_size=56, position_grid=4),
        fusion=FusionConfig(num_layers=3, hidden_width=16, num_heads=2),
        decoder=DecoderConfig(width=32, depth=1, num_heads=2, mlp_width=32),
    )
    tokenizer = Tokenizer(config)
    if with_statistics:
        tokenizer.set_statistics(torch.randn(32, 4, 4), torch.rand(32, 4, 4) + 0.5)
    tokenizer.save(path, provenance={"phase": "test", "note": "x" * 300})
    return path


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory) -> Path:
    """With statistics."""
    return save_tiny(tmp_path_factory.mktemp("checkpoints") / "tiny", 0, with_statistics=True)


@pytest.fixture(scope="session")
def other_checkpoint(tmp_path_factory) -> Path:
    """Same shapes, other weights, no statistics."""
    return save_tiny(tmp_path_factory.mktemp("checkpoints") / "other", 1, with_statistics=False)


def save_photo(path: Path, seed: int, size: tuple[int, int] = (90, 70)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    colours = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    Image.fromarray(colours).resize(size, Image.Resampling.BICUBIC).save(path)
    return path


@pytest.fixture
def photo(tmp_path) -> Path:
    """A 90x70 JPEG."""
    return save_photo(tmp_path / "photo.jpg", 0)


@pytest.fixture
def photos(tmp_path) -> Path:
    """Three photos, one in a subfolder, and a file that is none."""
    folder = tmp_path / "photos"
    for seed, name in enumerate(["b.jpg", "a.png", "more/c.webp"]):
        save_photo(folder / name, seed)
    (folder / "notes.txt").write_text("not a photo")
    return folder


BROKEN_IMAGES = {
    "empty.jpg": b"",
    "text.png": b"this is no image",
    "huge.png": b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR" + (30_000).to_bytes(4, "big") * 2 + b"\x08\x02\0\0\0",
}


@pytest.fixture(params=[*BROKEN_IMAGES, "truncated.jpg", "truncated.png", "elongated.png"])
def broken_image(request, tmp_path) -> Path:
    """A file that cannot be read as a photo."""
    path = tmp_path / "broken" / request.param
    path.parent.mkdir()
    if request.param in BROKEN_IMAGES:
        path.write_bytes(BROKEN_IMAGES[request.param])
    elif request.param == "elongated.png":
        save_photo(path, 0, (1, 5000))
    else:
        save_photo(path, 0)
        path.write_bytes(path.read_bytes()[:-200])
    return path


@pytest.fixture
def encoder_folder(tmp_path) -> Path:
    """A tiny DINOv2 with registers, as transformers saves it."""
    transformers = pytest.importorskip("transformers")
    config = transformers.Dinov2WithRegistersConfig(
        hidden_size=48, num_hidden_layers=3, num_attention_heads=2, image_size=70, patch_size=14
    )
    torch.manual_seed(0)
    transformers.Dinov2WithRegistersModel(config).save_pretrained(tmp_path / "dinov2")
    return tmp_path / "dinov2"


@pytest.fixture
def autoencoder_folder(tmp_path) -> Path:
    """A tiny AutoencoderRAE, as diffusers saves it."""
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    model = diffusers.AutoencoderRAE(
        encoder_hidden_size=64,
        encoder_num_hidden_layers=2,
        encoder_input_size=56,
        decoder_hidden_size=48,
        decoder_num_hidden_layers=1,
        decoder_num_attention_heads=2,
        decoder_intermediate_size=40,
        latents_mean=torch.zeros(64, 4, 4),
        latents_std=torch.ones(64, 4, 4),
    )
    model.save_pretrained(tmp_path / "rae")
    return tmp_path / "rae"
