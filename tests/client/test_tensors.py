"""Numbers to bytes and back, against safetensors and PyTorch."""

import json
import struct

import numpy as np
import pytest
import safetensors.torch
import torch

from drorae_client.errors import AnswerError, InputError
from drorae_client.wire.results import Latents
from drorae_client.wire.tensors import as_array, read_safetensors, to_bytes, write_safetensors


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "uint8"])
def test_files_are_those_of_safetensors(dtype: str) -> None:
    tensor = (torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0)) * 50).abs()
    tensor = tensor.to(getattr(torch, dtype))
    array, name = as_array(tensor)
    assert name == dtype
    file = write_safetensors("latents", array, dtype, {"model": "m"})
    assert torch.equal(safetensors.torch.load(file)["latents"], tensor)
    theirs = safetensors.torch.save({"latents": tensor}, {"model": "m"})
    read, read_dtype, metadata = read_safetensors("latents", theirs)
    assert (read_dtype, metadata) == (dtype, {"model": "m"})
    assert np.array_equal(read, array)
    assert read.flags.writeable


def test_bfloat16_rounds_as_pytorch_does() -> None:
    generator = torch.Generator().manual_seed(1)
    bits = torch.randint(-(2**31), 2**31, (100_000,), generator=generator, dtype=torch.int64)
    numbers = bits.to(torch.int32).view(torch.float32)
    numbers = torch.cat([numbers[numbers.isfinite()], torch.tensor([0.0, -0.0, torch.inf, -torch.inf])])
    ours = np.frombuffer(to_bytes(numbers.numpy(), "bfloat16"), np.int16)
    assert np.array_equal(ours, numbers.to(torch.bfloat16).view(torch.int16).numpy())
    assert np.isnan(np.frombuffer(to_bytes(np.array([np.nan]), "bfloat16") * 2, np.float32)).all()


def test_damaged_files_are_refused() -> None:
    file = write_safetensors("latents", np.zeros((1, 2), np.float32), "float32", {})
    header = {"latents": {"dtype": "F32", "shape": [3], "data_offsets": [0, 8]}}
    text = json.dumps(header).encode()
    lying = struct.pack("<Q", len(text)) + text + bytes(8)
    for data in (b"", b"x" * 20, file[:-1], file + b"x", lying):
        with pytest.raises(AnswerError):
            read_safetensors("latents", data)
    with pytest.raises(AnswerError):
        read_safetensors("images", file)


def test_latents_survive_a_file(tmp_path) -> None:
    latents = Latents(array=np.ones((2, 3, 1, 1), np.float32), dtype="bfloat16", normalized=True, model="m")
    latents.save(tmp_path / "l.safetensors")
    read = Latents.load(tmp_path / "l.safetensors")
    assert np.array_equal(read.array, latents.array)
    assert (read.dtype, read.normalized, read.model, read.checkpoint_sha256) == ("bfloat16", True, "m", None)
    (tmp_path / "other").write_bytes(b"other")
    with pytest.raises(InputError):
        Latents.load(tmp_path / "other")
    with pytest.raises(InputError):
        latents.save(tmp_path / "l.bin")
