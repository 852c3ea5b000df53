"""Small real parts for the training tests: photos-like images, a tiny encoder, a recipe."""

import io
import json
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from model.config import DecoderConfig, EncoderConfig, FusionConfig, TokenizerConfig
from model.tokenizer import Tokenizer

ROOT = Path(__file__).parents[2]
TINY = TokenizerConfig(
    name="tiny",
    image_size=32,
    encoder=EncoderConfig(
        width=32, depth=4, num_heads=2, patch_size=7, image_size=28, num_registers=1, position_grid=4
    ),
    fusion=None,
    decoder=DecoderConfig(width=32, depth=2, num_heads=2, mlp_width=64, patch_size=8),
)
TINY_FUSION = FusionConfig(num_layers=4, hidden_width=48, num_heads=2)


# A run in float64 agrees with its equal to about 1e-14; what is left is the six digits of the tables.
LOG_ERROR = 1.01e-5


@contextmanager
def in_float64() -> Iterator[None]:
    """Train in float64 whatever asks for float32, so that two runs which are equal by definition agree.

    In float32 no tolerance follows from the arithmetic. Sums in another order differ by some 1e-7, and the
    training magnifies that without a bound: the gradient of an L1 or a ReLU jumps where its argument changes
    its sign, Adam divides a gradient that is nothing but rounding by its own size, and the adversarial weight
    is a ratio of norms of gradients whose terms cancel. Two right runs were 1.5e-3 apart in that weight, and
    2e-5 in the parameters. In float64 they are 1e-14 apart, and anything that depends on the split shows.
    """
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with (
            patch.object(torch.Tensor, "float", torch.Tensor.double),
            patch.dict("training.data.crops.cache.DTYPES", {"float32": torch.float64}),
        ):
            yield
    finally:
        torch.set_default_dtype(before)


@pytest.fixture(autouse=True, scope="package")
def one_thread() -> Iterator[None]:
    """The networks are too small for several threads, which only spin where others keep the cores busy."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def exact() -> Iterator[None]:
    """The test trains in float64."""
    with in_float64():
        yield


def make_image(seed: int, size: tuple[int, int] = (48, 40)) -> Image.Image:
    """A smooth random picture."""
    noise = np.random.default_rng(seed).integers(0, 256, (6, 6, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize(size, Image.Resampling.BICUBIC)


def encode_png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def write_shard(file: Path, members: dict[str, bytes], mode: str = "w") -> Path:
    with tarfile.open(file, mode) as shard:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            shard.addfile(info, io.BytesIO(data))
    return file


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """A folder of twelve pictures."""
    folder = tmp_path / "photos"
    folder.mkdir()
    for index in range(12):
        make_image(index).save(folder / f"{index:02d}.png")
    return folder


@pytest.fixture
def encoder_checkpoint(tmp_path: Path) -> Path:
    """A phase 0 result with random weights."""
    torch.manual_seed(7)
    path = tmp_path / "phase0"
    Tokenizer(TINY).save(path)
    return path


@pytest.fixture
def recipe_file(tmp_path: Path, photos: Path, encoder_checkpoint: Path) -> Path:
    """A recipe of phases 1 to 3 with every loss on."""
    recipe = {
        "name": "tiny",
        "init": str(encoder_checkpoint),
        "output": str(tmp_path / "run"),
        "device": "cpu",
        "data": {
            "train": [str(photos)],
            "validation": [str(photos)],
            "resize_short_side": [32, 40],
            "num_workers": 0,
        },
        "fusion": TINY_FUSION.model_dump(),
        "num_steps": 6,
        "batch_size": 4,
        "accumulation_steps": 2,
        "noise_tau": 0.1,
        "optimizer": {"learning_rate": 1e-3, "warmup_steps": 2},
        "ema_decay": 0.9,
        "loss": {"perceptual_network": "efficientnet-lite0"},
        "discriminator": {"start_step": 1, "adversarial_start_step": 2},
        "log_every_steps": 1,
        "evaluate_every_steps": 3,
        "checkpoint_every_steps": 2,
    }
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump(recipe))
    return file


def launch(command: str, size: int, kill_at: int = 0, **options: Any) -> subprocess.CompletedProcess[str]:
    """A command on several ranks, in processes of their own."""
    job = {"command": command, "size": size, "kill_at": kill_at, "options": options}
    text = json.dumps(job, default=str)
    argv = [sys.executable, "-m", "tests.training.launch", text]
    return subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
