"""A tokenizer on disk, and folders of its latents."""

from collections.abc import Callable
from pathlib import Path

import pytest

from model.tokenizer import Tokenizer
from tests.training.latents.folders import make_latents


@pytest.fixture
def saved(encoder_checkpoint: Path) -> Tokenizer:
    """A random tokenizer that was loaded from a checkpoint."""
    return Tokenizer.load(encoder_checkpoint)


@pytest.fixture
def latents(saved: Tokenizer, tmp_path: Path) -> Callable[..., Path]:
    """Makes a folder named as the first argument says; other arguments are `make_latents`' own."""

    def make(name: str = "latents", **options: object) -> Path:
        return make_latents(saved, tmp_path / name, **options)  # type: ignore[arg-type]

    return make
