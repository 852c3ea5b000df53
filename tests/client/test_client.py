"""Both clients against the real service: every input, every answer."""

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from drorae_client import InputError, Latents
from model.images.tensors import to_bytes
from service.codecs.images import read_image
from service.photos.decode import ImageRules

SIDE = 64
SHAPE = (32, 8, 8)


@pytest.fixture
def client(connect: Any, server: Any) -> Any:
    return connect(server.url)


@pytest.fixture(scope="module")
def expected(tokenizer: Any, png: bytes) -> np.ndarray:
    return tokenizer.encode(read_image(png, ImageRules(SIDE, 10**6, 20, exact=False))[None]).numpy()


def as_path(png: bytes, folder: Path) -> Any:
    (folder / "photo.png").write_bytes(png)
    return folder / "photo.png"


INPUTS: dict[str, Callable[[bytes, Path], Any]] = {
    "bytes": lambda png, folder: png,
    "path": as_path,
    "str": lambda png, folder: str(as_path(png, folder)),
    "picture": lambda png, folder: Image.open(io.BytesIO(png)),
    "array": lambda png, folder: np.array(Image.open(io.BytesIO(png))),
    "channels first": lambda png, folder: np.array(Image.open(io.BytesIO(png))).transpose(2, 0, 1),
    "floats": lambda png, folder: np.array(Image.open(io.BytesIO(png))) / 255,
    "torch": lambda png, folder: torch.from_numpy(np.array(Image.open(io.BytesIO(png)))),
    "list": lambda png, folder: [png],
}


@pytest.mark.parametrize("given", INPUTS)
def test_encode_takes_every_input(
    client: Any, png: bytes, tmp_path: Path, expected: np.ndarray, given: str
) -> None:
    latents = client.encode(INPUTS[given](png, tmp_path), dtype="float32")
    assert latents.array.dtype == np.float32
    assert np.abs(latents.array - expected).mean() < 0.02  # tensors are resized otherwise than files


def test_an_answer_says_where_it_is_from(client: Any, png: bytes, tokenizer: Any) -> None:
    latents = client.encode([png, png])
    assert latents.array.shape == (2, *SHAPE)
    assert latents.array.dtype == np.float16
    assert (latents.model, latents.checkpoint_sha256) == ("tiny", tokenizer.checkpoint.sha256)
    assert (latents.latent, latents.normalized, latents.dtype) == ("enriched", False, "float16")
    assert len(latents.request_id) == 32
    assert latents.timings["device"] > 0


def test_bfloat16(client: Any, png: bytes, expected: np.ndarray, tokenizer: Any) -> None:
    """On the wire bfloat16, here float32 of the same values, in PyTorch bfloat16 again."""
    latents = client.encode(png, dtype="bfloat16")
    assert (latents.dtype, latents.array.dtype) == ("bfloat16", np.float32)
    assert torch.equal(latents.torch(), torch.from_numpy(expected).to(torch.bfloat16))
    assert latents.torch().dtype == torch.bfloat16
    for given in (latents, latents.torch()):
        pictures = client.decode(given)
        wanted = to_bytes(tokenizer.decode(latents.torch().float()))
        assert np.abs(pictures.array.astype(int) - wanted.numpy().astype(int)).max() <= 1


def test_options_reach_the_service(client: Any, png: bytes, tokenizer: Any) -> None:
    base = client.encode(png, latent="base", fit="pad", dtype="float32")
    assert base.latent == "base"
    normalized = client.encode(png, normalize=True, dtype="float32")
    plain = client.encode(png, dtype="float32")
    assert normalized.normalized
    assert np.abs(normalized.array - plain.array).max() > 0.1
    pictures = [client.decode(latents).array.astype(int) for latents in (normalized, plain)]
    assert np.abs(pictures[0] - pictures[1]).max() <= 1
    bare = client.decode(normalized.array, normalize=True).array.astype(int)
    assert np.abs(pictures[0] - bare).max() <= 1


def test_decode_takes_what_encode_gives(client: Any, png: bytes, tmp_path: Path) -> None:
    latents = client.encode([png, png])
    latents.save(tmp_path / "l.safetensors")
    latents.save(tmp_path / "l.npy")
    pictures = client.decode(latents)
    assert pictures.array.shape == (2, 3, SIDE, SIDE)
    assert pictures.array.dtype == np.uint8
    assert pictures.model == "tiny"
    assert [picture.size for picture in pictures.pil()] == [(SIDE, SIDE)] * 2
    assert pictures.torch().shape == (2, 3, SIDE, SIDE)
    others: list[Any] = [
        tmp_path / "l.safetensors",
        (tmp_path / "l.npy").read_bytes(),
        latents.array,
        Latents.load(tmp_path / "l.safetensors"),
    ]
    for given in others:
        assert np.array_equal(client.decode(given).array, pictures.array)
    assert np.array_equal(client.decode(latents.array[0]).array, pictures.array[:1])


def test_picture_files(client: Any, png: bytes) -> None:
    latents = client.encode(png)
    numbers = client.decode(latents)
    files, jpeg = (client.decode(latents, files=name) for name in ("png", "jpg"))
    assert files.files[0].startswith(b"\x89PNG")
    assert jpeg.files[0].startswith(b"\xff\xd8")
    assert np.array_equal(files.array, numbers.array)
    assert files.checkpoint_sha256 == latents.checkpoint_sha256


def test_reconstruct(client: Any, png: bytes) -> None:
    numbers = client.reconstruct([png, png])
    assert numbers.array.shape == (2, 3, SIDE, SIDE)
    files = client.reconstruct(png, files="png", latent="base")
    assert len(files) == len(files.psnr) == len(files.ssim) == 1
    assert 0 < files.psnr[0] < 100


def test_info_and_ready(client: Any, connect: Any, tokenizer: Any) -> None:
    info = client.info()
    assert (info.model, info.image_size, info.latent_shape) == ("tiny", SIDE, SHAPE)
    assert info.has_statistics
    assert info.limits["max_items_per_request"] == 8
    assert info.document["device"] == "cpu"
    assert client.ready()
    assert not connect("http://127.0.0.1:9").ready()


@pytest.mark.parametrize(
    "given",
    [
        "nowhere.png",
        Path(),
        [],
        b"",
        7,
        np.zeros((8, 8), np.uint8),
        np.zeros((4, 8, 8), np.uint8),
        np.zeros((3, 8, 8), np.int64),
        [np.zeros((3, 8, 8), np.uint8), b"file"],
        [np.zeros((2, 3, 8, 8), np.uint8)],
        [np.zeros((3, 8, 8), np.uint8), np.zeros((3, 9, 8), np.uint8)],
    ],
    ids=repr,
)
def test_input_that_cannot_be_sent(client: Any, given: Any) -> None:
    with pytest.raises(InputError):
        client.encode(given)


def test_latents_that_cannot_be_sent(client: Any) -> None:
    for given in (np.zeros(SHAPE, np.int32), "nowhere.npy"):
        with pytest.raises(InputError):
            client.decode(given)


def test_arrays_of_one_shape_are_one_request(client: Any, photo: Any) -> None:
    pixels = np.array(photo)
    assert len(client.encode([pixels, pixels])) == 2
    assert len(client.encode(np.stack([pixels] * 3))) == 3


@pytest.mark.parametrize("url", ["", "127.0.0.1:8000", "ftp://x", "http://", "http://x/?a=b", 7])
def test_addresses_that_are_none(connect: Any, url: Any) -> None:
    with pytest.raises(InputError):
        connect(url)


def test_keys_that_are_none(connect: Any) -> None:
    with pytest.raises(InputError):
        connect("http://x", api_key="two words")
