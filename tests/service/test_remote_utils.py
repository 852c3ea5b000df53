"""diffusers' own client, unchanged, against a running server."""

from typing import Any

import numpy as np
import pytest
import torch
from diffusers.image_processor import VaeImageProcessor
from diffusers.utils.remote_utils import remote_decode, remote_encode
from PIL import Image
from torch import Tensor

from model.images.tensors import to_bytes
from model.tokenizer import Tokenizer
from service.codecs.images import read_image
from service.photos.decode import ImageRules

SIDE = 64


@pytest.fixture(scope="module")
def encode_url(server: Any) -> str:
    return f"{server.url}/encode?format=raw"


@pytest.fixture(scope="module")
def decode_url(server: Any) -> str:
    return f"{server.url}/decode"


@pytest.fixture(scope="module")
def pictures(tokenizer: Tokenizer, latents: Tensor) -> Tensor:
    """The shared latents decoded here, [3, 3, S, S] in [0, 1]."""
    return tokenizer.decode(latents)


def test_encode_a_picture(encode_url: str, tokenizer: Tokenizer, photo: Image.Image, png: bytes) -> None:
    latents = remote_encode(endpoint=encode_url, image=photo)
    expected = tokenizer.encode(read_image(png, ImageRules(SIDE, 10**6, 20, exact=False))[None])
    assert latents.dtype == torch.float16
    torch.testing.assert_close(latents.float(), expected, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_encode_a_tensor(encode_url: str, tokenizer: Tokenizer, dtype: torch.dtype) -> None:
    unit = torch.rand((2, 3, SIDE, SIDE), generator=torch.Generator().manual_seed(5))
    latents = remote_encode(endpoint=encode_url, image=(unit * 2 - 1).to(dtype))
    assert latents.dtype == dtype
    tolerance = {torch.float32: 1e-3, torch.float16: 3e-2, torch.bfloat16: 3e-1}[dtype]
    torch.testing.assert_close(latents.float(), tokenizer.encode(unit), rtol=tolerance, atol=tolerance)


def test_encode_a_preprocessed_picture(encode_url: str, photo: Image.Image) -> None:
    """diffusers' own preprocessing gives [-1, 1], and another size is fitted."""
    # Contiguous: of other tensors the client sends memory that is freed already.
    tensor = VaeImageProcessor(vae_scale_factor=8).preprocess(photo).contiguous()
    from_tensor = remote_encode(endpoint=encode_url, image=tensor)
    from_picture = remote_encode(endpoint=encode_url, image=photo)
    assert (from_tensor - from_picture.float()).abs().mean() < 0.05


@pytest.mark.parametrize(("image_format", "atol"), [("png", 1), ("jpg", 40)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_decode_to_a_picture(
    decode_url: str, latents: Tensor, pictures: Tensor, image_format: Any, atol: int, dtype: torch.dtype
) -> None:
    picture = remote_decode(
        endpoint=decode_url, tensor=latents[:1].to(dtype), do_scaling=False, image_format=image_format
    )
    assert isinstance(picture, Image.Image)
    assert picture.format == {"png": "png", "jpg": "jpeg"}[image_format]
    array = torch.from_numpy(np.array(picture)).permute(2, 0, 1)
    slack = 0 if dtype == torch.float32 else 3
    assert (array.int() - to_bytes(pictures[0]).int()).abs().max() <= atol + slack


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_decode_to_a_tensor(decode_url: str, latents: Tensor, pictures: Tensor, dtype: torch.dtype) -> None:
    decoded = remote_decode(
        endpoint=decode_url, tensor=latents.to(dtype), do_scaling=False, output_type="pt", return_type="pt"
    )
    assert isinstance(decoded, Tensor)
    assert decoded.dtype == dtype
    assert decoded.shape == (3, 3, SIDE, SIDE)
    torch.testing.assert_close(decoded.float(), pictures * 2 - 1, atol=3e-2, rtol=0)


def test_decode_to_a_tensor_with_a_processor(decode_url: str, latents: Tensor, pictures: Tensor) -> None:
    decoded = remote_decode(
        endpoint=decode_url,
        tensor=latents[:1],
        processor=VaeImageProcessor(),
        do_scaling=False,
        output_type="pt",
        return_type="pil",
    )
    array = torch.from_numpy(np.array(decoded)).permute(2, 0, 1)
    assert (array.int() - to_bytes(pictures[0]).int()).abs().max() <= 1


def test_decode_partially_postprocessed(decode_url: str, latents: Tensor, pictures: Tensor) -> None:
    options: dict[str, Any] = {"do_scaling": False, "output_type": "pt", "partial_postprocess": True}
    decoded = remote_decode(endpoint=decode_url, tensor=latents, return_type="pt", **options)
    assert isinstance(decoded, Tensor)
    assert decoded.dtype == torch.uint8
    assert decoded.shape == (3, SIDE, SIDE, 3)
    assert (decoded.permute(0, 3, 1, 2).int() - to_bytes(pictures).int()).abs().max() <= 1
    as_pictures = remote_decode(endpoint=decode_url, tensor=latents, return_type="pil", **options)
    assert isinstance(as_pictures, list)
    assert as_pictures[0].size == (SIDE, SIDE)


def test_decode_for_a_processor_on_the_clients_side(
    decode_url: str, latents: Tensor, pictures: Tensor
) -> None:
    decoded = remote_decode(
        endpoint=decode_url,
        tensor=latents,
        processor=VaeImageProcessor(),
        do_scaling=False,
        output_type="pil",
    )
    assert isinstance(decoded, list)
    array = torch.from_numpy(np.stack([np.array(picture) for picture in decoded])).permute(0, 3, 1, 2)
    assert (array.int() - to_bytes(pictures).int()).abs().max() <= 1


def test_a_single_latent_with_height_and_width(decode_url: str, latents: Tensor) -> None:
    picture = remote_decode(endpoint=decode_url, tensor=latents[0], do_scaling=False, height=SIDE, width=SIDE)
    assert isinstance(picture, Image.Image)
    with pytest.raises(RuntimeError, match="pictures are 64x64"):
        remote_decode(endpoint=decode_url, tensor=latents[0], do_scaling=False, height=512, width=512)


def test_neutral_scaling_is_accepted(
    encode_url: str, decode_url: str, photo: Image.Image, latents: Tensor
) -> None:
    remote_encode(endpoint=encode_url, image=photo, scaling_factor=1.0, shift_factor=0.0)
    remote_decode(endpoint=decode_url, tensor=latents[:1], scaling_factor=1.0, shift_factor=0.0)


def test_other_scaling_is_refused_with_advice(
    encode_url: str, decode_url: str, photo: Image.Image, latents: Tensor
) -> None:
    with pytest.raises(RuntimeError, match=r"scaling_factor=0\.18215 is impossible"):
        remote_encode(endpoint=encode_url, image=photo, scaling_factor=0.18215)
    with pytest.raises(RuntimeError, match="do_scaling=False"):
        remote_decode(endpoint=decode_url, tensor=latents[:1], scaling_factor=0.5)


@pytest.mark.filterwarnings("ignore:.*do_scaling.*:FutureWarning")
def test_default_scaling_is_refused_with_advice(decode_url: str, latents: Tensor) -> None:
    with pytest.raises(RuntimeError, match="pass do_scaling=False"):
        remote_decode(endpoint=decode_url, tensor=latents[:1])


def test_errors_reach_the_client_as_problems(decode_url: str) -> None:
    with pytest.raises(RuntimeError, match=r"shape \[1, 4, 8, 8\]"):
        remote_decode(endpoint=decode_url, tensor=torch.zeros(1, 4, 8, 8), do_scaling=False)
