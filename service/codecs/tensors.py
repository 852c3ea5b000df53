"""Tensors to bytes and back: raw little-endian numbers, ``.npy`` and safetensors. Nothing is pickled."""

import ast
import io
import json
import math
import re
import struct
from collections.abc import Mapping, Sequence

import numpy as np
import safetensors.torch
import torch
from torch import Tensor

from model.tokenizer import finite_items
from service.codecs.json.documents import unique_names
from service.codecs.json.slices import copied
from service.errors import LatentsError, MalformedError, OptionError, UnprocessableError, overflowing

DTYPES: Mapping[str, torch.dtype] = {
    "uint8": torch.uint8,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float32": torch.float32,
}
"""Number types by the name that requests and answers use."""

FLOAT_DTYPES = (torch.float16, torch.bfloat16, torch.float32)

NPY_MAGIC = b"\x93NUMPY"
_NPY_FLOATS = re.compile(r"[<>=|]?f[24]")
_NPY_VERSIONS = {b"\x01\0": ("<H", "latin-1"), b"\x02\0": ("<I", "latin-1"), b"\x03\0": ("<I", "utf-8")}
"""Formats of the header's length and text by version."""
_MAX_NPY_HEADER_BYTES = 1000  # a Python literal: parsed, deep ones could exhaust the stack
# What Python raises on literals that are damaged.
_LITERAL_ERRORS = (ValueError, SyntaxError, TypeError, RecursionError, MemoryError)
_SAFETENSORS_FLOATS = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32}
_MAX_SAFETENSORS_HEADER_BYTES = 100_000
_MAX_DIMENSIONS = 8
_MAX_NUMBERS = 2**48  # far beyond every body, and in bytes still an int64


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
    return _from_bytes(data, DTYPES[dtype], shape)


def read_npy(data: bytes) -> Tensor:
    """A ``.npy`` file of float16 or float32 to a tensor.

    Raises:
        MalformedError: not a complete ``.npy`` file.
        LatentsError: numbers of another type, or an impossible shape.
    """
    header, offset = _npy_header(data)
    descr, fortran_order = header["descr"], header["fortran_order"]
    if not isinstance(descr, str) or not _NPY_FLOATS.fullmatch(descr):
        name = "object" if descr == "|O" else _shown(descr)
        raise LatentsError(f"The .npy file has dtype {name}; float16 and float32 are read.")
    dtype = np.dtype(descr)
    shape = _checked_shape(header["shape"])
    num_bytes, expected = len(data) - offset, math.prod(shape) * dtype.itemsize
    if num_bytes != expected or not isinstance(fortran_order, bool):
        raise MalformedError(
            f"The .npy file is truncated or has bytes to spare: shape {shape} of {dtype} needs "
            f"{expected} bytes, it has {num_bytes}."
        )
    flat = np.frombuffer(data, dtype, offset=offset) if expected else np.empty(0, dtype)
    array = flat.reshape(shape[::-1]).T if fortran_order else flat.reshape(shape)
    return torch.from_numpy(np.array(array, dtype=dtype.newbyteorder("="), order="C"))


def read_safetensors(data: bytes, name: str) -> tuple[Tensor, dict[str, str]]:
    """The only tensor of a safetensors file, and the file's metadata.

    Args:
        data: the file.
        name: required name of the tensor.

    Raises:
        MalformedError: not a complete safetensors file.
        LatentsError: other tensors than ``name``, numbers of another type than the three floats, or an
            impossible shape.
    """
    header, metadata, offset = _safetensors_header(data)
    if list(header) != [name]:
        raise LatentsError(
            f"The safetensors file holds the tensors {_shown(sorted(header)[:10])}; it must hold just one, "
            f"{name!r}."
        )
    entry = header[name]
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise MalformedError(
            f"The safetensors header is damaged: the entry of {name!r} must hold dtype, shape and "
            "data_offsets."
        )
    dtype = _SAFETENSORS_FLOATS.get(entry["dtype"]) if isinstance(entry["dtype"], str) else None
    if dtype is None:
        raise LatentsError(
            f"The tensor {name!r} has dtype {_shown(entry['dtype'])}; float16, bfloat16 and float32 are read."
        )
    shape, offsets = _checked_shape(entry["shape"]), entry["data_offsets"]
    num_bytes, expected = len(data) - offset, math.prod(shape) * dtype.itemsize
    if num_bytes != expected or not _are_sizes(offsets) or list(offsets) != [0, expected]:
        raise MalformedError(
            f"The body is not a complete safetensors file: shape {shape} of {entry['dtype']} needs "
            f"data_offsets [0, {expected}] and as many bytes; they are {_shown(offsets)}, and {num_bytes} "
            "bytes."
        )
    return _from_bytes(data, dtype, shape, offset), metadata


def looks_like_safetensors(data: bytes) -> bool:
    """Whether the first bytes are a header length and a JSON object that fits."""
    return len(data) > 9 and data[8:9] == b"{" and struct.unpack("<Q", data[:8])[0] <= len(data) - 8


def write_raw(tensor: Tensor) -> bytes:
    """The numbers, little-endian, in C order."""
    return copied(tensor.contiguous().view(torch.uint8).numpy().data.cast("B"))


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
    """Finite numbers in a type that may be narrower.

    Raises:
        OptionError: a number is too large for it.
    """
    if tensor.dtype == dtype:
        return tensor
    narrowed = tensor.to(dtype)
    if dtype.is_floating_point and first_non_finite(narrowed) is not None:
        raise overflowing(str(dtype).removeprefix("torch."))
    return narrowed


def first_non_finite(batch: Tensor) -> int | None:
    """Index of the first item of [N, ...] that holds a NaN or an infinity, or None."""
    finite = finite_items(batch)
    return None if bool(finite.all()) else int((~finite).nonzero()[0])


def _from_bytes(data: bytes, dtype: torch.dtype, shape: Sequence[int], offset: int = 0) -> Tensor:
    """Little-endian numbers, as many as the shape has, to a tensor of its own memory."""
    if len(data) == offset:
        return torch.empty(list(shape), dtype=dtype)
    numbers = np.frombuffer(data, np.uint8, offset=offset).copy()  # without the interpreter's lock
    return torch.from_numpy(numbers).view(dtype).reshape(list(shape))


def _checked_shape(shape: object) -> list[int]:
    """The shape in a file's header; no tensor operation can fail for it.

    Raises:
        LatentsError: not a list of a few sizes, or their product is beyond all bounds.
    """
    if (
        not isinstance(shape, list | tuple)
        or len(shape) > _MAX_DIMENSIONS
        or not _are_sizes(shape)
        or math.prod(max(size, 1) for size in shape) > _MAX_NUMBERS
    ):
        raise LatentsError(
            f"The header declares the shape {_shown(shape)}; at most {_MAX_DIMENSIONS} sizes of 0 or more "
            "are read."
        )
    return list(shape)


def _are_sizes(values: object) -> bool:
    """Whether this is a list of whole numbers of 0 or more; True and False are not."""
    return isinstance(values, list | tuple) and all(type(value) is int and value >= 0 for value in values)


def _shown(value: object) -> str:
    """A value of a file, short enough for a sentence."""
    if isinstance(value, str) and value.isalnum():
        text = value
    else:
        text = repr(value[:10] if isinstance(value, list | tuple) else value)
    return text if len(text) <= 100 else f"{text[:100]}..."


def _npy_header(data: bytes) -> tuple[dict[str, object], int]:
    """The header, with descr, fortran_order and shape, and the offset of the numbers."""
    damaged = MalformedError("The body is not a readable .npy file: its header is damaged.")
    version = data[6:8]
    if not data.startswith(NPY_MAGIC) or len(version) < 2:
        raise damaged
    if version not in _NPY_VERSIONS:
        raise MalformedError(f"The .npy file has format version {tuple(version)}; 1.0 to 3.0 are read.")
    length_format, encoding = _NPY_VERSIONS[version]
    begin = 8 + struct.calcsize(length_format)
    if len(data) < begin:
        raise damaged
    end = begin + struct.unpack_from(length_format, data, 8)[0]
    if end > min(len(data), begin + _MAX_NPY_HEADER_BYTES):
        raise damaged
    try:
        header = ast.literal_eval(data[begin:end].decode(encoding).strip())
    except _LITERAL_ERRORS as exc:
        raise damaged from exc
    if not isinstance(header, dict) or set(header) != {"descr", "fortran_order", "shape"}:
        raise damaged
    return header, end


def _safetensors_header(data: bytes) -> tuple[dict[str, object], dict[str, str], int]:
    """The entries by tensor name, the metadata, and the offset of the numbers."""
    if not looks_like_safetensors(data):
        raise MalformedError("The body is not a complete safetensors file: its header is missing or cut.")
    num_bytes = struct.unpack("<Q", data[:8])[0]
    if num_bytes > _MAX_SAFETENSORS_HEADER_BYTES:
        raise MalformedError(f"The safetensors header is larger than {_MAX_SAFETENSORS_HEADER_BYTES} bytes.")
    try:
        header = json.loads(data[8 : 8 + num_bytes].decode(), object_pairs_hook=unique_names)
    except (ValueError, RecursionError) as exc:
        raise MalformedError("The body is not a safetensors file: its header is not valid JSON.") from exc
    metadata = header.pop("__metadata__", {}) if isinstance(header, dict) else None
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise MalformedError("The safetensors header is damaged: its metadata is not a map of strings.")
    return header, metadata, 8 + num_bytes
