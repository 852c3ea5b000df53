"""Request bodies to model inputs: the format of a body, and its contents.

Shape legend: N items, C h w one latent, S image side.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from model.images.opening import sniff
from service.codecs import tensors
from service.codecs.facts import ModelFacts
from service.codecs.images import read_pixels
from service.codecs.json.documents import looks_like_json, read_document
from service.codecs.json.files import read_files
from service.codecs.json.numbers import read_numbers
from service.codecs.media_types import JSON, NPY, RAW, SAFETENSORS
from service.codecs.multipart import MULTIPART, split_multipart
from service.codecs.schemas import (
    CommonOptions,
    DecodeOptions,
    EncodeOptions,
    ImagesIn,
    LatentsIn,
    ReconstructOptions,
)
from service.errors import (
    ForeignCheckpointError,
    ImageError,
    LatentsError,
    MediaTypeError,
    OptionError,
    TooLargeError,
)
from service.photos.decode import ImagePart, ImageRules

ImageOptions = EncodeOptions | ReconstructOptions

IMAGE_FILE = "image/*"
IMAGE_MEDIA_TYPES = ("image/jpeg", "image/png", "image/webp", "image/gif", "image/bmp", "image/tiff")
IMAGE_BODY_MEDIA_TYPES = (*IMAGE_MEDIA_TYPES, MULTIPART, JSON, RAW)
LATENT_BODY_MEDIA_TYPES = (SAFETENSORS, NPY, JSON, RAW)

# Types that say nothing about the body; the second is curl's default for --data-binary.
_UNTYPED = ("", "application/x-www-form-urlencoded", "application/octet-stream", "binary/octet-stream")
# No registered types, but widely sent; the file's own first bytes say what it is.
_IMAGE_ALIASES = ("image/*", "image/jpg", "image/pjpeg", "image/x-png", "image/x-ms-bmp", "image/x-tiff")
_PIXEL_SLACK = 1.0
_BATCH_DIMENSIONS = 4
# A body with its parts or files, or with its numbers, which may be in another type.
_READING_COPIES = {MULTIPART: 2, JSON: 2, RAW: 3, NPY: 3, SAFETENSORS: 3}
_BYTES_OF_JSON_NUMBER = 7  # while it is read: in float32, and twice in the skeleton of the lists


@dataclass
class Payload:
    """A body with what its headers say of it; ``media_type`` is empty where they say nothing."""

    data: bytes
    media_type: str
    boundary: bytes | None = None

    def release(self) -> None:
        """Let go of the bytes once they were read, so that they take no memory while the model works."""
        self.data = b""


@dataclass(frozen=True)
class LatentBatch:
    """Latents [N, C, h, w], float32 and finite, and whether they are normalised per position."""

    latents: Tensor
    normalized: bool


def image_body_kind(payload: Payload, options: ImageOptions) -> str:
    """Media type that an image body is read as, `IMAGE_FILE` for any image file.

    Raises:
        MediaTypeError: a type that is not read, or a body whose type shows nowhere.
        OptionError: ``shape`` with a body that has a shape of its own.
    """
    kind = _body_kind(payload, options, (*IMAGE_BODY_MEDIA_TYPES, *_IMAGE_ALIASES), _sniff_image_body)
    return IMAGE_FILE if kind.startswith("image/") else kind


def latent_body_kind(payload: Payload, options: DecodeOptions) -> str:
    """Media type that a latent body is read as.

    Raises:
        MediaTypeError: a type that is not read, or a body whose type shows nowhere.
        OptionError: ``shape`` with a body that has a shape of its own.
    """
    return _body_kind(payload, options, LATENT_BODY_MEDIA_TYPES, _sniff_latent_body)


def declared_items(options: CommonOptions, max_items: int) -> int:
    """How many items a body has, as far as its query tells: those of a raw tensor, else one.

    Raises:
        TooLargeError: more than ``max_items``.
    """
    shape = options.shape or []
    num_items = shape[0] if len(shape) == _BATCH_DIMENSIONS else 1
    _check_count(num_items, max_items)
    return num_items


def reading_bytes(
    kind: str, body_bytes: int, max_items: int = 0, latent_shape: Sequence[int] | None = None
) -> int:
    """Most memory that reading a body takes, the body included.

    Args:
        kind: media type that it is read as.
        body_bytes: its size.
        max_items: of a body of latents, most items that it may hold.
        latent_shape: of a body of latents, [C, h, w] of each item.
    """
    if kind == JSON and latent_shape is not None:
        num_numbers = min(max_items * math.prod(latent_shape), body_bytes // len("0,"))
        return body_bytes + _BYTES_OF_JSON_NUMBER * num_numbers
    return _READING_COPIES.get(kind, 1) * body_bytes


def split_images(payload: Payload, kind: str, max_items: int) -> list[ImagePart]:
    """The image files of a body, undecoded.

    Raises:
        ServiceError: malformed, or more than ``max_items``.
    """
    if kind == MULTIPART:
        files = split_multipart(payload.data, payload.boundary, max_items)
    elif kind == JSON:
        _, files = read_document(
            payload.data, ImagesIn, "images", b'[""]', partial(read_files, max_files=max_items)
        )
    else:
        files = [payload.data]
    if len(files) == 1:
        return [ImagePart("the image", files[0])]
    return [ImagePart(f"image {index}", file) for index, file in enumerate(files)]


def read_raw_images(payload: Payload, options: ImageOptions, rules: ImageRules) -> list[Tensor]:
    """The images of a raw tensor body, each [3, S, S]; uint8, or float32 in [0, 1].

    Raises:
        ServiceError: of another size or shape than the query says, or values out of range.
    """
    batch = tensors.read_raw(payload.data, options.shape, options.dtype)
    if batch.ndim == _BATCH_DIMENSIONS - 1:
        batch = batch[None]
    if batch.ndim != _BATCH_DIMENSIONS or batch.shape[1] != 3:
        raise ImageError(f"Image tensors have shape [N, 3, H, W] or [3, H, W], not {options.shape}.")
    if batch.dtype != torch.uint8:
        batch = _unit_range(batch.float(), options.range or "signed")
    several = len(batch) > 1
    return [
        read_pixels(pixels, rules, f"image {index}" if several else "the image")
        for index, pixels in enumerate(batch)
    ]


def read_latents(
    payload: Payload, kind: str, options: DecodeOptions, tokenizer: ModelFacts, max_items: int
) -> LatentBatch:
    """The latents of a body, held to the tokenizer's shape and checkpoint.

    Raises:
        ServiceError: the body cannot be read, or its latents do not belong to this model.
    """
    normalized: bool | None = None
    if kind == SAFETENSORS:
        latents, metadata = tensors.read_safetensors(payload.data, "latents")
        normalized = _normalized_flag(metadata.get("normalized"))
        _check_checkpoint(metadata.get("checkpoint_sha256"), tokenizer)
    elif kind == NPY:
        latents = tensors.read_npy(payload.data)
    elif kind == JSON:
        max_shape = (max_items, *tokenizer.config.latent_shape)
        document, latents = read_document(
            payload.data, LatentsIn, "latents", b"[0]", partial(read_numbers, max_shape=max_shape)
        )
        normalized = document.normalized
        _check_checkpoint(document.checkpoint_sha256, tokenizer)
    else:
        latents = tensors.read_raw(payload.data, options.shape, options.dtype)
    if latents.dtype not in tensors.FLOAT_DTYPES:
        raise LatentsError("Latents are floating-point numbers: float16, bfloat16 or float32.")
    latents = _as_batch(latents, tokenizer.config.latent_shape)
    _check_count(len(latents), max_items)
    bad = tensors.first_non_finite(latents)
    if bad is not None:
        raise LatentsError(f"Latent {bad} holds a NaN or infinite value.")
    return LatentBatch(latents.float(), _agreed_normalization(options.normalize, normalized))


def _body_kind(
    payload: Payload,
    options: CommonOptions,
    readable: Sequence[str],
    sniff: Callable[[bytes], str | None],
) -> str:
    kind = payload.media_type
    if kind in _UNTYPED:
        sniffed = RAW if options.shape is not None else sniff(payload.data)
        if sniffed is None:
            raise MediaTypeError(
                f"The body has no Content-Type and looks like none of {', '.join(readable)}; "
                "raw tensors need the options shape and dtype."
            )
        return sniffed
    if kind not in readable:
        raise MediaTypeError(
            f"Content-Type {kind[:100]!r} is not read here; readable: {', '.join(readable)}."
        )
    if options.shape is not None and kind != RAW:
        raise OptionError(
            f"The option 'shape' describes a raw tensor ({RAW}); this body has a shape of its own."
        )
    return kind


def _sniff_image_body(data: bytes) -> str | None:
    if sniff(data) is not None:
        return IMAGE_FILE
    return JSON if looks_like_json(data) else None


def _sniff_latent_body(data: bytes) -> str | None:
    if data.startswith(tensors.NPY_MAGIC):
        return NPY
    if tensors.looks_like_safetensors(data):
        return SAFETENSORS
    return JSON if looks_like_json(data) else None


def _check_count(num_items: int, max_items: int) -> None:
    if num_items > max_items:
        raise TooLargeError(f"The request has {num_items} items; at most {max_items} are accepted.")


def _unit_range(batch: Tensor, value_range: str) -> Tensor:
    """Floating-point pixels [N, 3, H, W] to [0, 1]; a small overshoot, as of a resize, is clamped."""
    bad = tensors.first_non_finite(batch)
    if bad is not None:
        raise ImageError(f"Image {bad} holds a NaN or infinite value.")
    low, high = (-1.0, 1.0) if value_range == "signed" else (0.0, 1.0)
    outside = ((batch < low - _PIXEL_SLACK) | (batch > high + _PIXEL_SLACK)).flatten(1).any(dim=1)
    if outside.any():
        index = int(outside.nonzero()[0])
        extreme = batch[index].flatten()[batch[index].abs().argmax()].item()
        raise ImageError(
            f"Image {index} has the value {extreme:g}, outside [{low:g}, {high:g}] (range={value_range}): "
            "pixels of 0 to 255 are sent as uint8."
        )
    return ((batch - low) / (high - low)).clamp(0, 1)


def _as_batch(latents: Tensor, latent_shape: tuple[int, int, int]) -> Tensor:
    if tuple(latents.shape) == latent_shape:
        return latents[None]
    if latents.ndim != 4 or tuple(latents.shape[1:]) != latent_shape or len(latents) == 0:
        expected = ", ".join(str(size) for size in latent_shape)
        raise LatentsError(
            f"The latents have shape {list(latents.shape)}; this model's are [N, {expected}], N >= 1."
        )
    return latents


def _normalized_flag(text: str | None) -> bool | None:
    if text is None:
        return None
    if text not in ("true", "false"):
        raise LatentsError(f"The metadata 'normalized' is {text[:50]!r}; it is 'true' or 'false'.")
    return text == "true"


def _agreed_normalization(option: bool | None, metadata: bool | None) -> bool:
    if option is not None and metadata is not None and option != metadata:
        raise OptionError(
            f"normalize={str(option).lower()} contradicts the latents' own metadata, "
            f"normalized={str(metadata).lower()}: leave the option out."
        )
    return bool(metadata if option is None else option)


def _check_checkpoint(sha256: str | None, tokenizer: ModelFacts) -> None:
    ours = tokenizer.checkpoint.sha256 if tokenizer.checkpoint else None
    if sha256 is not None and sha256 != ours:
        raise ForeignCheckpointError(
            f"The latents are of checkpoint {sha256[:64]!r}; this service has {ours or 'unsaved weights'}."
        )
