"""Tensors to bytes and back: raw little-endian numbers, ``.npy`` and safetensors. Nothing is pickled."""

import io
import json
import math
import struct
import tokenize
from collections.abc import Mapping, Sequence

import numpy as np
import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from model.tokenizer import finite_items
from service.errors import LatentsError, MalformedError, OptionError, UnprocessableError

DTYPES: Mapping[str, torch.dtype] = {
    "uint8": torch.uint8,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float32": torch.float32,
}
"""Number types by the name that requests and answers use."""

FLOAT_DTYPES = (torch.float16, torch.bfloat16, torch.float32)

NPY_MAGIC = b"\x93NUMPY"
_SAFETENSORS_FLOATS = ("F16", "BF16", "F32")
_MAX_SAFETENSORS_HEADER_BYTES = 100_000
_MAX_NPY_HEADER_CHARS = 10_000
# What numpy raises on headers, which are Python literals, that are damaged.
_NPY_HEADER_ERRORS = (
    ValueError,
    SyntaxError,
    tokenize.TokenError,
    TypeError,
    OverflowError,
    RecursionError,
    EOFError,
)


def read_raw(data: bytes, shape: Sequence[int] | None, dtype: str | None) -> Tensor:
    """Raw numbers to a tensor of the shape and dtype that the query names.

    Raises:
        OptionError: ``shape`` or ``dtype`` is missing.
        UnprocessableError: the number of bytes is another than they say.
    """
    if shape is None or dtype is None:
        missing = "shape" if shape is None else "dtype"
        raise OptionError(
            f"A raw tensor body needs the option {missing!r}, as in ?shape=1&shape=3&dtype=float16."
        )
    expected = math.prod(shape) * DTYPES[dtype].itemsize
    if expected != len(data):
        raise UnprocessableError(
            f"A {dtype} tensor of shape {list(shape)} has {expected} bytes, but the body has {len(data)}."
        )
    return torch.frombuffer(bytearray(data), dtype=DTYPES[dtype]).reshape(list(shape))


def read_npy(data: bytes) -> Tensor:
    """A ``.npy`` file of float16 or float32 to a tensor.

    Raises:
        MalformedError: not a complete ``.npy`` file.
        LatentsError: numbers of another type.
    """
    stream = io.BytesIO(data)
    try:
        version = np.lib.format.read_magic(stream)
        readers = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
        if version not in readers:
            raise MalformedError(f"The .npy file has format version {version}; 1.0 and 2.0 are read.")
        shape, fortran_order, dtype = readers[version](stream, max_header_size=_MAX_NPY_HEADER_CHARS)
    except _NPY_HEADER_ERRORS as exc:
        raise MalformedError("The body is not a readable .npy file: its header is damaged.") from exc
    if dtype.newbyteorder("=") not in (np.dtype(np.float16), np.dtype(np.float32)):
        raise LatentsError(f"The .npy file has dtype {dtype}; float16 and float32 are read.")
    num_bytes = len(data) - stream.tell()
    expected = math.prod(shape) * dtype.itemsize
    if num_bytes != expected:
        raise MalformedError(
            f"The .npy file is truncated or has bytes to spare: shape {list(shape)} of {dtype} needs "
            f"{expected} bytes, it has {num_bytes}."
        )
    flat = np.frombuffer(data, dtype, offset=stream.tell())
    array = flat.reshape(shape[::-1]).T if fortran_order else flat.reshape(shape)
    return torch.from_numpy(np.array(array, dtype=dtype.newbyteorder("="), order="C"))


def read_safetensors(data: bytes, name: str) -> tuple[Tensor, dict[str, str]]:
    """The only tensor of a safetensors file, and the file's metadata.

    Args:
        data: the file.
        name: what the tensor must be called.

    Raises:
        MalformedError: not a complete safetensors file.
        LatentsError: other tensors than ``name``, or numbers of another type than the three floats.
    """
    header, metadata = _safetensors_header(data)
    if list(header) != [name]:
        raise LatentsError(
            f"The safetensors file holds the tensors {sorted(header)[:10]}; it must hold just one, {name!r}."
        )
    entry = header[name]
    dtype = entry.get("dtype") if isinstance(entry, dict) else None
    if isinstance(dtype, str) and dtype not in _SAFETENSORS_FLOATS:
        raise LatentsError(f"The tensor {name!r} has dtype {dtype}; float16, bfloat16 and float32 are read.")
    try:
        tensors = safetensors.torch.load(data)
    except SafetensorError as exc:
        raise MalformedError(f"The body is not a complete safetensors file: {exc}.") from exc
    return tensors[name], metadata


def looks_like_safetensors(data: bytes) -> bool:
    """Whether the first bytes are a header length and a JSON object that fits."""
    return len(data) > 9 and data[8:9] == b"{" and struct.unpack("<Q", data[:8])[0] <= len(data) - 8


def write_raw(tensor: Tensor) -> bytes:
    """The numbers, little-endian, in C order."""
    return tensor.contiguous().view(torch.uint8).numpy().tobytes()


def write_npy(tensor: Tensor) -> bytes:
    """A ``.npy`` file.

    Raises:
        OptionError: bfloat16, which the format does not have.
    """
    if tensor.dtype == torch.bfloat16:
        raise OptionError("The .npy format has no bfloat16: ask for dtype=float32, or for another format.")
    buffer = io.BytesIO()
    np.save(buffer, tensor.numpy(), allow_pickle=False)
    return buffer.getvalue()


def write_safetensors(name: str, tensor: Tensor, metadata: Mapping[str, str]) -> bytes:
    """A safetensors file with one tensor and metadata."""
    return safetensors.torch.save({name: tensor.contiguous()}, dict(metadata))


def narrow(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Finite float32 to a narrower type.

    Raises:
        OptionError: a number is too large for it.
    """
    narrowed = tensor.to(dtype)
    largest = tensor.abs().max()
    if dtype.is_floating_point and not torch.isfinite(largest.to(dtype)):
        raise OptionError(
            f"The numbers reach {largest.item():.4g}, too large for {str(dtype).removeprefix('torch.')}: "
            f"ask for dtype=bfloat16 or float32."
        )
    return narrowed


def first_non_finite(batch: Tensor) -> int | None:
    """Index of the first item of [N, ...] that holds a NaN or an infinity, or None."""
    finite = finite_items(batch)
    return None if bool(finite.all()) else int((~finite).nonzero()[0])


def _safetensors_header(data: bytes) -> tuple[dict[str, object], dict[str, str]]:
    """The entries by tensor name, and the metadata."""
    if not looks_like_safetensors(data):
        raise MalformedError("The body is not a complete safetensors file: its header is missing or cut.")
    num_bytes = struct.unpack("<Q", data[:8])[0]
    if num_bytes > _MAX_SAFETENSORS_HEADER_BYTES:
        raise MalformedError(f"The safetensors header is larger than {_MAX_SAFETENSORS_HEADER_BYTES} bytes.")
    try:
        header = json.loads(data[8 : 8 + num_bytes])
    except (ValueError, RecursionError) as exc:
        raise MalformedError("The body is not a safetensors file: its header is not valid JSON.") from exc
    metadata = header.pop("__metadata__", {}) if isinstance(header, dict) else None
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise MalformedError("The safetensors header is damaged: its metadata is not a map of strings.")
    return header, metadata
