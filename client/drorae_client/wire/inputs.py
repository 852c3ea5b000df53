"""What callers give, as bodies of requests.

Shape legend: N images, H W pixels; N items, C h w one latent.
"""

import io
import os
import sys
from collections.abc import AsyncIterable, AsyncIterator, Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import httpx
import numpy as np

from drorae_client.errors import InputError
from drorae_client.wire.results import Latents
from drorae_client.wire.tensors import Array, as_array, to_bytes, write_safetensors

ImageInput: TypeAlias = Any
"""One image: a path, the bytes of a file, a PIL image, or an array (NumPy's, PyTorch's, ...).

Arrays are [3, H, W] or [H, W, 3]: uint8, or floats in [0, 1].
"""
ImagesInput: TypeAlias = Any
"""An `ImageInput`, a list or tuple of them, or an array [N, 3, H, W] or [N, H, W, 3]."""
LatentsInput: TypeAlias = Any
"""`Latents`, a path or the bytes of a file of latents, or an array [N, C, h, w] or [C, h, w]."""

OCTETS = "application/octet-stream"
"""Media type of files: the service looks at their first bytes."""
RAW = "tensor/binary"
SAFETENSORS = "application/x-safetensors"

_LATENT_DTYPES = ("float16", "bfloat16", "float32")
_PNG_MODES = ("1", "L", "LA", "P", "RGB", "RGBA", "I;16")


@dataclass(frozen=True)
class Body:
    """A request's body, with the query that describes it."""

    content: bytes
    media_type: str
    query: tuple[tuple[str, str], ...] = ()


def images_body(images: ImagesInput) -> Body:
    """One image as it is, several files as multipart/form-data, arrays as one tensor.

    Raises:
        InputError: a file that cannot be read, an array of another shape or dtype, or images that cannot go
            into one request.
    """
    if not isinstance(images, list | tuple):
        return _tensor_body(_pixels(*as_array(images))) if _is_array(images) else Body(_file(images), OCTETS)
    if not images:
        raise InputError("there are no images to send")
    if len({kind_of(image) for image in images}) > 1:
        raise InputError(
            "images of one request are all files or PIL images, or all arrays of one shape and dtype; "
            "encode_many takes any mixture"
        )
    if not _is_array(images[0]):
        files = [_file(image) for image in images]
        return Body(files[0], OCTETS) if len(files) == 1 else _multipart(files)
    batches = [_pixels(*as_array(image)) for image in images]
    if any(len(batch) != 1 for batch in batches):
        raise InputError("a list holds single images; give an array [N, 3, H, W] alone")
    return _tensor_body(np.concatenate(batches))


def latents_body(latents: LatentsInput, dtype: str | None = None) -> Body:
    """Latents as safetensors; files as they are.

    Args:
        latents: see `LatentsInput`.
        dtype: that an array's numbers are sent in; by default their own.

    Raises:
        InputError: a file that cannot be read, or numbers of another dtype.
    """
    if isinstance(latents, Latents):
        return Body(latents.to_safetensors(), SAFETENSORS)
    if not _is_array(latents):
        return Body(_file(latents), OCTETS)
    array, own_dtype = as_array(latents)
    name = dtype or ("float32" if own_dtype == "float64" else own_dtype)
    if name not in _LATENT_DTYPES:
        raise InputError(f"latents are {', '.join(_LATENT_DTYPES)} numbers, not {name}")
    return Body(write_safetensors("latents", array, name, {}), SAFETENSORS)


def kind_of(image: ImageInput) -> Hashable:
    """Equal for images that can go into one request."""
    if not _is_array(image):
        return "file"
    return tuple(getattr(image, "shape", ())), str(getattr(image, "dtype", ""))


def check_several(images: object) -> None:
    """Refuse one image where several are wanted: a name would be taken for its letters.

    Raises:
        InputError: a path, bytes or a PIL image.
    """
    if not _is_array(images):
        raise InputError(f"encode_many takes several images, and this is one {type(images).__name__}")


class Batcher:
    """Puts images together that can go into one request.

    Args:
        size: most images of a batch.
    """

    def __init__(self, size: int) -> None:
        self._size = size
        self._images: list[ImageInput] = []

    def add(self, image: ImageInput) -> list[ImageInput]:
        """The batch that is complete now that this image came; mostly empty."""
        is_full = len(self._images) == self._size
        complete = (
            self.rest() if is_full or (self._images and kind_of(self._images[0]) != kind_of(image)) else []
        )
        self._images.append(image)
        return complete

    def rest(self) -> list[ImageInput]:
        """The last batch; may be empty."""
        rest, self._images = self._images, []
        return rest


def batches(images: Iterable[ImageInput], size: int) -> Iterator[list[ImageInput]]:
    """Images in lists of at most ``size``, each of one kind."""
    batcher = Batcher(size)
    for image in images:
        if complete := batcher.add(image):
            yield complete
    if rest := batcher.rest():
        yield rest


async def async_batches(
    images: Iterable[ImageInput] | AsyncIterable[ImageInput], size: int
) -> AsyncIterator[list[ImageInput]]:
    """As `batches`, also of what is iterated asynchronously."""
    if isinstance(images, Iterable):
        for some in batches(images, size):
            yield some
        return
    batcher = Batcher(size)
    async for image in images:
        if complete := batcher.add(image):
            yield complete
    if rest := batcher.rest():
        yield rest


def _is_array(value: Any) -> bool:
    if isinstance(value, str | os.PathLike | bytes | bytearray | memoryview):
        return False
    return not _is_picture(value)


def _is_picture(value: Any) -> bool:
    pillow = sys.modules.get("PIL.Image")  # where it was not imported, nothing is of it
    return pillow is not None and isinstance(value, pillow.Image)


def _file(value: Any) -> bytes:
    if isinstance(value, bytes | bytearray | memoryview):
        return bytes(value)
    if isinstance(value, str | os.PathLike):
        return read_file(value)
    return _png(value)


def read_file(path: str | os.PathLike[str]) -> bytes:
    """The bytes of a file.

    Raises:
        InputError: it cannot be read; says why.
    """
    try:
        return Path(path).read_bytes()
    except OSError as exc:
        raise InputError(f"{os.fspath(path)}: {exc.strerror or exc}") from exc


def _png(picture: Any) -> bytes:
    """A PIL image as PNG, quickly compressed; modes that PNG lacks become RGB."""
    buffer = io.BytesIO()
    try:
        fitting = picture if picture.mode in _PNG_MODES else picture.convert("RGB")
        fitting.save(buffer, "PNG", compress_level=1)
    except (OSError, ValueError) as exc:  # a file that Pillow opened, and that is cut
        raise InputError(f"the PIL image cannot be read: {exc}") from exc
    return buffer.getvalue()


def _multipart(files: Sequence[bytes]) -> Body:
    parts = [("images", (str(index), file, OCTETS)) for index, file in enumerate(files)]
    request = httpx.Request("POST", "http://localhost", files=parts)
    return Body(request.read(), request.headers["Content-Type"])


def _pixels(array: Array, dtype: str) -> Array:
    """Pixels [N, 3, H, W], uint8 or float32 in [0, 1]."""
    if dtype != "uint8":
        if not np.issubdtype(array.dtype, np.floating):
            raise InputError(f"pixels are uint8, or floats in [0, 1]; the array is {dtype}")
        array = array.astype(np.float32)
    batch = array[None] if array.ndim == 3 else array
    if batch.ndim == 4 and batch.shape[1] != 3 and batch.shape[3] == 3:
        batch = batch.transpose(0, 3, 1, 2)
    if batch.ndim != 4 or batch.shape[1] != 3 or 0 in batch.shape:
        raise InputError(
            f"an image is an array [3, H, W] or [H, W, 3], several are [N, 3, H, W] or [N, H, W, 3]; "
            f"this one has shape {list(array.shape)}"
        )
    return batch


def _tensor_body(pixels: Array) -> Body:
    dtype = str(pixels.dtype)
    query = [("shape", str(size)) for size in pixels.shape]
    described = [*query, ("dtype", dtype)]
    if dtype != "uint8":
        described.append(("range", "unit"))
    return Body(to_bytes(pixels, dtype), RAW, tuple(described))
