"""Requests of every operation, and how their answers are read. No input or output happens here."""

import base64
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Generic, Literal, TypedDict, TypeVar, Unpack

from drorae_client.errors import AnswerError, DroraeError, InputError, service_error
from drorae_client.wire.inputs import SAFETENSORS, Body, ImagesInput, LatentsInput, images_body, latents_body
from drorae_client.wire.results import Info, Latents, Pictures
from drorae_client.wire.tensors import read_safetensors

T = TypeVar("T")
FileFormat = Literal["png", "jpg"]

JSON = "application/json"
PROBLEM = "application/problem+json"
_NO_BODY = Body(b"", "")


@dataclass(frozen=True)
class Answer:
    """A whole answer; the names of headers are in lower case."""

    status: int
    headers: Mapping[str, str]
    body: bytes

    @property
    def media_type(self) -> str:
        """Without parameters."""
        return self.headers.get("content-type", "").partition(";")[0].strip().lower()

    @property
    def request_id(self) -> str | None:
        """As the service names it."""
        return self.headers.get("x-request-id")

    @property
    def timings(self) -> dict[str, float]:
        """Milliseconds by stage, of ``Server-Timing``."""
        found = {}
        for entry in self.headers.get("server-timing", "").split(","):
            name, _, value = entry.strip().partition(";dur=")
            if name and value:
                found[name] = float(value)
        return found

    @property
    def told(self) -> dict[str, Any]:
        """What headers tell, as fields of a result."""
        return {"request_id": self.request_id, "timings": self.timings}


@dataclass(frozen=True)
class Call(Generic[T]):
    """A request without its address, and the reader of its good answer."""

    path: str
    read: Callable[[Answer], T]
    accept: str = JSON
    body: Body = _NO_BODY
    options: tuple[tuple[str, str], ...] = ()

    @property
    def method(self) -> str:
        """POST with a body, else GET."""
        return "POST" if self.body.content else "GET"


class ImageOptions(TypedDict, total=False):
    """Options of what takes images.

    Attributes:
        latent: ``enriched`` by fusing the layers (default), or ``base``, the last layer's.
        fit: how an image becomes square: ``crop`` (default), ``pad`` with white, or ``stretch``.
    """

    latent: Literal["enriched", "base"]
    fit: Literal["crop", "pad", "stretch"]


class EncodeOptions(ImageOptions, total=False):
    """Options of ``encode`` and ``encode_many``.

    Attributes:
        dtype: of the latents on the wire (default ``float16``).
        normalize: normalise the latents per position (default False).
    """

    dtype: Literal["float16", "bfloat16", "float32"]
    normalize: bool


class DecodeOptions(TypedDict, total=False):
    """Options of ``decode``.

    Attributes:
        normalize: whether the latents are normalised; by default what they say themselves, else no.
        files: ``png`` or ``jpg`` asks for picture files, which are smaller; by default numbers come.
    """

    normalize: bool
    files: FileFormat


class ReconstructOptions(ImageOptions, total=False):
    """Options of ``reconstruct``.

    Attributes:
        files: ``png`` or ``jpg`` asks for picture files, with PSNR and SSIM; by default numbers come.
    """

    files: FileFormat


def encode_call(images: ImagesInput, **options: Unpack[EncodeOptions]) -> Call[Latents]:
    """Images to latents.

    Raises:
        InputError: the images cannot be sent.
    """
    wire_options = dict(options)
    wire_options["output_dtype"] = wire_options.pop("dtype", "float16")
    return Call("/encode", _read_latents, SAFETENSORS, _some(images_body(images)), _query(wire_options))


def decode_call(latents: LatentsInput, **options: Unpack[DecodeOptions]) -> Call[Pictures]:
    """Latents to pictures.

    Raises:
        InputError: the latents cannot be sent, or there are no such files.
    """
    return _pictures_call("/decode", _some(latents_body(latents)), dict(options))


def reconstruct_call(images: ImagesInput, **options: Unpack[ReconstructOptions]) -> Call[Pictures]:
    """Images to their reconstructions.

    Raises:
        InputError: the images cannot be sent, or there are no such files.
    """
    return _pictures_call("/reconstruct", _some(images_body(images)), dict(options))


def info_call() -> Call[Info]:
    """What runs at the service."""
    return Call("/info", _read_info)


def ready_call() -> Call[bool]:
    """Whether the service takes work."""
    return Call("/readyz", lambda answer: answer.status == 200)


def error_of(answer: Answer) -> DroraeError:
    """The error that an answer other than 200 is."""
    if answer.media_type == PROBLEM:
        try:
            document = json.loads(answer.body)
            return service_error(
                answer.status,
                str(document["type"]),
                str(document["detail"]),
                document.get("request_id") or answer.request_id,
            )
        except (ValueError, KeyError, TypeError, AttributeError):
            pass  # said so below
    where = answer.headers.get("location")
    if where and 300 <= answer.status < 400:
        return AnswerError(f"status {answer.status}, a redirection to {where}: give that address instead")
    text = " ".join(answer.body[:200].decode("utf-8", "replace").split())
    return AnswerError(
        f"status {answer.status} from something other than the service: {text!r}", answer.request_id
    )


def is_problem(answer: Answer) -> bool:
    """Whether the service itself wrote an answer, rather than a proxy."""
    return answer.media_type == PROBLEM


def _query(options: Mapping[str, object]) -> tuple[tuple[str, str], ...]:
    """The options that are given, as the service writes them. The service knows which values are good."""
    given = {name: value for name, value in options.items() if value is not None}
    return tuple(
        (name, str(value).lower() if isinstance(value, bool) else str(value)) for name, value in given.items()
    )


def _some(body: Body) -> Body:
    if not body.content:
        raise InputError("the file is empty")
    return body


def _pictures_call(path: str, body: Body, options: dict[str, Any]) -> Call[Pictures]:
    image_format = options.pop("files", None)
    if image_format is None:
        return Call(path, _read_pictures, SAFETENSORS, body, _query(options))
    return Call(path, _read_files, JSON, body, _query(options | {"image_format": image_format}))


def _read_latents(answer: Answer) -> Latents:
    return Latents.from_safetensors(answer.body, **answer.told)


def _read_pictures(answer: Answer) -> Pictures:
    numbers, _, metadata = read_safetensors("images", answer.body)
    sha256 = metadata.get("checkpoint_sha256")
    return Pictures(numbers=numbers, model=metadata.get("model"), checkpoint_sha256=sha256, **answer.told)


def _read_files(answer: Answer) -> Pictures:
    document = _document(answer)
    try:
        return Pictures(
            files=tuple(base64.b64decode(text) for text in document["images"]),
            psnr=tuple(math.inf if value is None else value for value in document.get("psnr", ())),
            ssim=tuple(document.get("ssim", ())),
            model=document["model"],
            checkpoint_sha256=document["checkpoint_sha256"],
            **answer.told,
        )
    except (KeyError, TypeError, ValueError) as exc:
        raise AnswerError("the answer holds no pictures", answer.request_id) from exc


def _read_info(answer: Answer) -> Info:
    document = _document(answer)
    try:
        channels, height, width = document["latent"]["shape"]
        return Info(
            model=document["model"],
            checkpoint_sha256=document["checkpoint_sha256"],
            version=document["version"],
            image_size=document["image_size"],
            latent_shape=(channels, height, width),
            has_statistics=document["latent"]["normalization"],
            limits=document["limits"],
            document=document,
            **answer.told,
        )
    except (KeyError, TypeError, ValueError) as exc:
        raise AnswerError("/info does not describe this kind of service", answer.request_id) from exc


def _document(answer: Answer) -> dict[str, Any]:
    try:
        document = json.loads(answer.body)
    except ValueError as exc:
        raise AnswerError("the answer is no JSON", answer.request_id) from exc
    if not isinstance(document, dict):
        raise AnswerError("the answer is no JSON object", answer.request_id)
    return document
