"""A small data set and checkpoint, and the folder of latents that one worker makes of them."""

import hashlib
from pathlib import Path

import pytest
import torch

from model.tokenizer import Tokenizer
from tests.training.conftest import TINY, TINY_FUSION, encode_png, make_image, write_shard
from training.latents.tokenize import TokenizeOptions, tokenize_command

BROKEN = 3


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    torch.manual_seed(7)
    path = tmp_path_factory.mktemp("checkpoint") / "tiny"
    tokenizer = Tokenizer(TINY.model_copy(update={"fusion": TINY_FUSION}))
    tokenizer.set_statistics(torch.zeros(32, 4, 4), torch.ones(32, 4, 4))
    tokenizer.save(path)
    return path


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> list[Path]:
    """A folder of two classes with a broken image, a tar and a compressed one: 42 images, 13 units."""
    base = tmp_path_factory.mktemp("data")
    for index in range(20):
        file = base / "photos" / f"class{index % 2}" / f"{index:02d}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(b"no image" if index == BROKEN else encode_png(make_image(index)))
    for name, mode, first in (("a.tar", "w", 20), ("b.tar.gz", "w:gz", 31)):
        members = {f"{index}.png": encode_png(make_image(index)) for index in range(first, first + 11)}
        write_shard(base / name, members, mode)
    return [base / "photos", base / "a.tar", base / "b.tar.gz"]


@pytest.fixture
def options(checkpoint, data, tmp_path) -> TokenizeOptions:
    return TokenizeOptions(data, tmp_path / "out", str(checkpoint), batch_size=4, flip=True, num_workers=1)


@pytest.fixture(scope="module")
def expected(checkpoint, data, tmp_path_factory) -> dict[str, str]:
    """Digests of what one worker makes."""
    folder = tmp_path_factory.mktemp("expected")
    whole = TokenizeOptions(data, folder, str(checkpoint), batch_size=4, flip=True, num_workers=1)
    assert tokenize_command(whole) == 3
    return digests(folder)


def digests(folder: Path) -> dict[str, str]:
    """SHA-256 of every file, hidden ones too."""
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in folder.iterdir()}
