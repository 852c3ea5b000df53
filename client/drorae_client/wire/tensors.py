"""Arrays to bytes and back: safetensors files of one tensor, and bfloat16 without a NumPy type for it.

NumPy has no bfloat16. Here such numbers are float32 arrays: every bfloat16 is a float32 whose lower half is
zero, so widening loses nothing. On the wire they are bfloat16.

The format is read and written here because `safetensors.numpy` needs a further package for bfloat16 and does
not give the metadata of a file in memory.
"""

import json
import math
import struct
import sys
from collections.abc import Mapping
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from drorae_client.errors import AnswerError, InputError

Array: TypeAlias = NDArray[Any]

_WIRE_TYPES = {"uint8": "U8", "float16": "F16", "bfloat16": "BF16", "float32": "F32"}
_NAMES = {wire: name for name, wire in _WIRE_TYPES.items()}
_NAN_BITS = 0x7FC0


def as_array(value: Any) -> tuple[Array, str]:
    """Anything that is an array, and the name of its dtype; bfloat16 is widened to float32.

    Takes NumPy arrays, those of ml_dtypes, PyTorch tensors of any device, and what has ``__array__``.

    Raises:
        InputError: it is no array.
    """
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(value, torch.Tensor):
        tensor = value.detach().cpu()
        if tensor.dtype == torch.bfloat16:
            return tensor.float().numpy(), "bfloat16"
        return tensor.numpy(), str(tensor.dtype).removeprefix("torch.")
    if not hasattr(value, "__array__"):
        raise InputError(f"a value of type {type(value).__name__} is neither an array nor a file")
    array = np.asarray(value)
    if array.dtype.name == "bfloat16":  # of ml_dtypes, which NumPy converts
        return array.astype(np.float32), "bfloat16"
    return array, array.dtype.name


def to_torch(array: Array, dtype: str) -> Any:
    """The array as a PyTorch tensor of the named dtype. Imports torch."""
    import torch

    return torch.from_numpy(np.array(array)).to(getattr(torch, dtype))


def to_bytes(array: Array, dtype: str) -> bytes:
    """The numbers in the named dtype, little-endian."""
    if dtype == "bfloat16":
        return _bfloat16_bits(array).astype("<u2").tobytes()
    return array.astype(np.dtype(dtype).newbyteorder("<")).tobytes()


def from_bytes(data: bytes | memoryview, dtype: str, shape: list[int]) -> Array:
    """An array of its own memory; bfloat16 as float32."""
    if dtype == "bfloat16":
        bits = np.frombuffer(data, "<u2").astype(np.uint32) << 16
        return bits.view(np.float32).reshape(shape)
    return np.frombuffer(data, np.dtype(dtype).newbyteorder("<")).astype(dtype).reshape(shape)


def write_safetensors(name: str, array: Array, dtype: str, metadata: Mapping[str, str]) -> bytes:
    """A safetensors file with one tensor of the named dtype."""
    data = to_bytes(array, dtype)
    entry = {"dtype": _WIRE_TYPES[dtype], "shape": list(array.shape), "data_offsets": [0, len(data)]}
    header = json.dumps({"__metadata__": dict(metadata), name: entry}).encode()
    header += b" " * (-len(header) % 8)
    return struct.pack("<Q", len(header)) + header + data


def read_safetensors(name: str, data: bytes) -> tuple[Array, str, dict[str, str]]:
    """The tensor of a safetensors file, the name of its dtype, and the file's metadata.

    Raises:
        AnswerError: it is not a whole file with this one tensor.
    """
    try:
        (header_bytes,) = struct.unpack_from("<Q", data)
        header = json.loads(data[8 : 8 + header_bytes])
        metadata = header.pop("__metadata__", {})
        ((found, entry),) = header.items()
        dtype, shape = _NAMES[entry["dtype"]], entry["shape"]
        begin, end = (8 + header_bytes + offset for offset in entry["data_offsets"])
        size = np.dtype("uint16" if dtype == "bfloat16" else dtype).itemsize
        if found != name or end != len(data) or end - begin != math.prod(shape) * size:
            raise ValueError("another tensor, or other bytes")
        return from_bytes(memoryview(data)[begin:end], dtype, shape), dtype, dict(metadata)
    except (struct.error, ValueError, KeyError, TypeError, AttributeError) as exc:
        raise AnswerError(f"this is no whole safetensors file with the tensor {name!r} alone") from exc


def _bfloat16_bits(array: Array) -> Array:
    """Rounded to the nearest, ties to even, as PyTorch rounds; NaN stays NaN."""
    bits = array.astype(np.float32).view(np.uint32)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return np.where(np.isnan(array), _NAN_BITS, rounded).astype(np.uint16)
