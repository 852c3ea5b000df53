"""Model outputs to the bytes of an answer, in the format that was negotiated.

Shape legend: N items, C h w one latent, S image side.
"""

import io
import math
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor

from model.images.similarity import psnr, ssim
from model.images.tensors import dtype_name, to_bytes, to_unit
from service.codecs import tensors
from service.codecs.facts import ModelFacts
from service.codecs.images import PictureFormat, PngCompression, write_picture
from service.codecs.json.documents import write_document
from service.codecs.json.files import write_files
from service.codecs.json.numbers import write_numbers
from service.codecs.media_types import JPEG, JSON, NPY, PICTURE_MEDIA_TYPES, PNG, RAW, SAFETENSORS, WEBP, ZIP
from service.codecs.schemas import (
    EncodeOptions,
    FloatName,
    LatentsOut,
    PictureOutOptions,
    PicturesOut,
    ReconstructionsOut,
    ReconstructOptions,
)
from service.errors import OptionError

_PICTURE_FORMATS: Mapping[str, PictureFormat] = {PNG: "png", JPEG: "jpeg", WEBP: "webp"}
_EXTENSIONS: Mapping[PictureFormat, str] = {"png": "png", "jpeg": "jpg", "webp": "webp"}
_ZIP_TIME = (1980, 1, 1, 0, 0, 0)  # equal pictures give equal bytes


@dataclass(frozen=True)
class Answer:
    """An answer: its bytes, their media type, and HTTP headers beyond it."""

    content: bytes
    media_type: str
    headers: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Origin:
    """The model that made an answer; part of every format that has room for it."""

    model: str
    checkpoint_sha256: str | None

    @classmethod
    def of(cls, tokenizer: ModelFacts) -> "Origin":
        """The origin of what this tokenizer makes."""
        checkpoint = tokenizer.checkpoint
        return cls(tokenizer.config.name, checkpoint.sha256 if checkpoint else None)

    def metadata(self) -> dict[str, str]:
        """As safetensors metadata."""
        sha256 = {"checkpoint_sha256": self.checkpoint_sha256} if self.checkpoint_sha256 else {}
        return {"model": self.model, **sha256}


def latent_dtype(options: EncodeOptions) -> torch.dtype:
    """Type of the latents that ``/encode`` answers with.

    Raises:
        OptionError: ``dtype=uint8`` where it does not describe a raw tensor body.
    """
    if options.output_dtype is not None:
        return tensors.DTYPES[options.output_dtype]
    if options.dtype == "uint8" and options.shape is None:
        raise OptionError("Latents have no dtype=uint8: ask for float16, bfloat16 or float32.")
    if options.dtype is None or options.dtype == "uint8":
        return torch.float16
    return tensors.DTYPES[options.dtype]


def latents_answer(
    latents: Tensor,
    media_type: str,
    options: EncodeOptions,
    origin: Origin,
    names: Mapping[str, str] | None = None,
) -> Answer:
    """Latents [N, C, h, w] as an answer.

    Args:
        latents: results of the model, float32 or already of the answer's type.
        media_type: as negotiated.
        options: type of the numbers, and how the latents were made.
        origin: which model made them.
        names: further metadata for the format that has some, safetensors.

    Raises:
        OptionError: a dtype that the format lacks, or that the numbers overflow.
    """
    narrowed = tensors.narrow(latents, latent_dtype(options))
    if media_type == JSON:
        document = LatentsOut.model_construct(
            model=origin.model,
            checkpoint_sha256=origin.checkpoint_sha256,
            latent=options.latent,
            normalized=options.normalize,
            dtype=cast(FloatName, dtype_name(narrowed.dtype)),
            shape=list(narrowed.shape),
            latents=[],
        )
        return Answer(write_document(document, {"latents": write_numbers(narrowed)}), JSON)
    metadata = {
        **origin.metadata(),
        "normalized": str(options.normalize).lower(),
        "latent": options.latent,
        **(names or {}),
    }
    return _tensor_answer("latents", narrowed, media_type, metadata)


def writing_bytes(kind: str, media_type: str, result_bytes: int) -> int:
    """Most memory that writing an answer takes, the answer included.

    Latents as text have up to 22 characters per number. Other formats hold the results once more in another
    type, and then as bytes.

    Args:
        kind: ``latents`` or ``pictures``.
        media_type: of the answer.
        result_bytes: size of the results as float32.
    """
    as_text = kind == "latents" and media_type == JSON
    return (6 if as_text else 2) * result_bytes


def offered_pictures(options: PictureOutOptions) -> tuple[str, ...]:
    """Media types of a picture answer, the default first; diffusers' options move the default."""
    if options.output_type == "pt":
        first = RAW
    elif options.image_format == "jpg":
        first = JPEG
    else:
        first = PNG
    return (first, *(media_type for media_type in PICTURE_MEDIA_TYPES if media_type != first))


def picture_dtype(media_type: str, options: PictureOutOptions, compares: bool = False) -> torch.dtype:
    """Type of the model's pictures that an answer is made of: bytes, unless it holds or compares numbers.

    Args:
        media_type: of the answer.
        options: type of picture tensors.
        compares: whether a JSON answer says how close pictures and originals are.
    """
    if media_type in (SAFETENSORS, NPY, RAW):
        is_bytes = _is_postprocessed(options) or _picture_dtype(options) == "uint8"
    else:
        is_bytes = not (compares and media_type == JSON)
    return torch.uint8 if is_bytes else torch.float32


def pictures_answer(
    pictures: Tensor,
    media_type: str,
    options: PictureOutOptions,
    origin: Origin,
    png: PngCompression = "fast",
) -> Answer:
    """Pictures [N, 3, S, S] as an answer.

    Args:
        pictures: results of the model, of the type that `picture_dtype` says; bytes, or in [0, 1].
        media_type: as negotiated; several pictures under an image type become a zip of that type.
        options: type, range and layout of picture tensors.
        origin: which model made them.
        png: how PNG files are compressed.
    """
    if media_type in (SAFETENSORS, NPY, RAW):
        return _tensor_answer("images", picture_tensor(pictures, options), media_type, origin.metadata())
    picture_format = _PICTURE_FORMATS.get(media_type, _fallback_format(options))
    files = [write_picture(pixels, picture_format, png) for pixels in pictures]
    if media_type == JSON:
        fields = PicturesOut(**_json_fields(options, origin))
        return Answer(write_document(fields, {"images": write_files(files)}), JSON)
    if media_type == ZIP or len(files) > 1:
        return Answer(_zip(files, _EXTENSIONS[picture_format]), ZIP)
    return Answer(files[0], media_type)


def reconstructions_answer(
    pictures: Tensor,
    originals: Sequence[Tensor],
    router_weights: Tensor | None,
    media_type: str,
    options: ReconstructOptions,
    origin: Origin,
    png: PngCompression = "fast",
) -> Answer:
    """Reconstructions [N, 3, S, S] in [0, 1] as an answer; JSON says how close they are to the originals.

    Args:
        pictures: results of the model.
        originals: the images that went into it, each [3, S, S], uint8 or in [0, 1].
        router_weights: [N, L, h, w], where the options ask for them.
        media_type: as for `pictures_answer`.
        options: what else JSON tells, and the form of picture tensors.
        origin: which model made them.
        png: how PNG files are compressed.
    """
    if media_type != JSON:
        return pictures_answer(pictures, media_type, options, origin, png)
    fields = {**_json_fields(options, origin), **_closeness(pictures, originals)}
    picture_format = _fallback_format(options)
    lists = {"images": write_files(write_picture(pixels, picture_format, png) for pixels in pictures)}
    if options.originals:
        lists["originals"] = write_files(write_picture(pixels, picture_format, png) for pixels in originals)
    if router_weights is not None:
        fields["router_mean"] = router_weights.mean(dim=(2, 3)).tolist()
        if options.router == "maps":
            lists["router_maps"] = write_numbers(router_weights)
    return Answer(write_document(ReconstructionsOut(**fields), lists), JSON)


def picture_tensor(pictures: Tensor, options: PictureOutOptions) -> Tensor:
    """Pictures [N, 3, S, S], bytes or in [0, 1], in the type, range and layout that the options ask for.

    uint8 [N, 3, S, S] by default; with diffusers' ``output_type=pt`` floating point in [-1, 1], or
    uint8 [N, S, S, 3] after ``partial_postprocess``; with its ``output_type=pil`` (a processor on
    the client's side) floating point in [0, 1].
    """
    if _is_postprocessed(options):
        return to_bytes(pictures).permute(0, 2, 3, 1).contiguous()
    name = _picture_dtype(options)
    if name == "uint8":
        return to_bytes(pictures).contiguous()
    value_range = options.range or ("unit" if options.output_type == "pil" else "signed")
    return (pictures * 2 - 1 if value_range == "signed" else pictures).to(tensors.DTYPES[name])


def _is_postprocessed(options: PictureOutOptions) -> bool:
    return options.output_type == "pt" and bool(options.partial_postprocess)


def _picture_dtype(options: PictureOutOptions) -> str:
    if options.output_dtype is not None:
        return options.output_dtype
    if options.shape is None and options.dtype is not None:  # with a shape, dtype describes the body
        return options.dtype
    if options.output_type is None:
        return "uint8"
    return "float16" if options.dtype in (None, "uint8") else options.dtype


def _tensor_answer(name: str, tensor: Tensor, media_type: str, metadata: Mapping[str, str]) -> Answer:
    headers = {"shape": str(list(tensor.shape)), "dtype": dtype_name(tensor.dtype)}
    if media_type == SAFETENSORS:
        content = tensors.write_safetensors(name, tensor, metadata)
    elif media_type == NPY:
        content = tensors.write_npy(tensor)
    else:
        content = tensors.write_raw(tensor)
    return Answer(content, media_type, headers)


def _fallback_format(options: PictureOutOptions) -> PictureFormat:
    """Of picture files where the media type names none."""
    return "jpeg" if options.image_format == "jpg" else "png"


def _json_fields(options: PictureOutOptions, origin: Origin) -> dict[str, Any]:
    """Fields of `PicturesOut`."""
    return {
        "model": origin.model,
        "checkpoint_sha256": origin.checkpoint_sha256,
        "image_format": _fallback_format(options),
        "images": [],
    }


def _closeness(pictures: Tensor, originals: Sequence[Tensor]) -> dict[str, list[float | None]]:
    """PSNR and SSIM of each picture, one at a time: SSIM takes 29 MiB for a picture of 256x256."""
    values: dict[str, list[float | None]] = {"psnr": [], "ssim": []}
    for picture, original in zip(pictures, originals, strict=True):
        pair = picture[None], to_unit(original)[None]
        decibels = psnr(*pair).item()
        values["psnr"].append(decibels if math.isfinite(decibels) else None)
        values["ssim"].append(ssim(*pair).item())
    return values


def _zip(files: list[bytes], extension: str) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED) as archive:  # the images are compressed already
        for index, file in enumerate(files):
            archive.writestr(zipfile.ZipInfo(f"{index:04d}.{extension}", _ZIP_TIME), file)
    return buffer.getvalue()
