"""The table of routes: where each one is, what answers it, and what goes in and out."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from pydantic import BaseModel

from service.api import routes
from service.codecs.media_types import JSON, LATENT_MEDIA_TYPES, PICTURE_MEDIA_TYPES, RAW
from service.codecs.requests import IMAGE_MEDIA_TYPES, LATENT_BODY_MEDIA_TYPES
from service.codecs.schemas import (
    CommonOptions,
    DecodeOptions,
    EncodeOptions,
    Health,
    ImagesIn,
    Info,
    LatentsIn,
    LatentsOut,
    PicturesOut,
    ReconstructionsOut,
    ReconstructOptions,
)
from service.engine.operations import DECODE, ENCODE, RECONSTRUCT, Operation
from service.http.middleware import Handler

JsonObject = dict[str, Any]
Schemas = Mapping[str, JsonObject]
"""JSON schema of a body or an answer by media type."""

REF_TEMPLATE = "#/components/schemas/{model}"
BINARY: JsonObject = {"type": "string", "format": "binary"}
TEXT: JsonObject = {"type": "string"}

PROBLEMS = {
    400: "Malformed: an empty body, a damaged image, invalid JSON or base64.",
    406: "Accept allows none of the formats that can be produced.",
    408: "The body paused for too long, or came too slowly; the connection is closed.",
    413: "Too many bytes, pixels or items; judged from headers, before decoding.",
    415: "A media type or content encoding that is not read here.",
    422: "A wrong shape, dtype, value or option, or latents of another checkpoint.",
    429: "The queue is full; Retry-After says when to come back.",
    500: "An unexpected failure of the service.",
    503: "Loading or draining; Retry-After says when to come back.",
    504: "The request's deadline passed.",
}
"""What a problem of each status means; all of them may answer an operation."""

_MULTIPART_IMAGES: JsonObject = {
    "type": "object",
    "properties": {"images": {"type": "array", "items": BINARY, "minItems": 1}},
    "required": ["images"],
    "additionalProperties": False,
}


def ref(document: type[BaseModel]) -> JsonObject:
    """The schema of a document, by reference."""
    return {"$ref": REF_TEMPLATE.format(model=document.__name__)}


_BODIES: Mapping[str, Schemas] = {
    "images": {
        **dict.fromkeys(IMAGE_MEDIA_TYPES, BINARY),
        "multipart/form-data": _MULTIPART_IMAGES,
        JSON: ref(ImagesIn),
        RAW: BINARY,
        "application/octet-stream": BINARY,
    },
    "latents": {
        **dict.fromkeys((*LATENT_BODY_MEDIA_TYPES, "application/octet-stream"), BINARY),
        JSON: ref(LatentsIn),
    },
}
_ANSWER_MEDIA_TYPES = {"latents": LATENT_MEDIA_TYPES, "pictures": PICTURE_MEDIA_TYPES}
_ADDRESS = "http://127.0.0.1:8000"
_ANSWERS = {"latents": "Latents [N, C, h, w].", "pictures": "One picture, a zip of several, or a tensor."}


@dataclass(frozen=True)
class Endpoint:
    """A route. The handler's docstring is its description.

    Attributes:
        path: where it is.
        handler: answers a request.
        summary: of a good answer.
        answers: schemas of a good answer.
        problems: statuses of other answers.
        bodies: schemas of the request's body; none for GET.
        options: query options.
        example: a command that calls it, where the service has its usual address; a photo is ``photo.jpg``.
    """

    path: str
    handler: Handler
    summary: str
    answers: Schemas
    problems: Iterable[int]
    bodies: Schemas = field(default_factory=dict)
    options: type[CommonOptions] | None = None
    example: str = ""

    @property
    def method(self) -> str:
        """GET, or POST where the request has a body."""
        return "POST" if self.bodies else "GET"


def _of_operation(
    operation: Operation,
    handler: Handler,
    options: type[CommonOptions],
    document: type[BaseModel],
    arguments: str,
) -> Endpoint:
    """The route of an operation; ``document`` is its JSON answer, ``arguments`` are curl's in its example."""
    answers = {**dict.fromkeys(_ANSWER_MEDIA_TYPES[operation.gives], BINARY), JSON: ref(document)}
    summary, bodies = _ANSWERS[operation.gives], _BODIES[operation.takes]
    example = f"curl -s --data-binary @{arguments} {_ADDRESS}/{operation.name}"
    return Endpoint(f"/{operation.name}", handler, summary, answers, PROBLEMS, bodies, options, example)


ENDPOINTS = (
    _of_operation(ENCODE, routes.encode, EncodeOptions, LatentsOut, "photo.jpg -o latents.safetensors"),
    _of_operation(DECODE, routes.decode, DecodeOptions, PicturesOut, "latents.safetensors -o decoded.png"),
    _of_operation(
        RECONSTRUCT,
        routes.reconstruct,
        ReconstructOptions,
        ReconstructionsOut,
        "photo.jpg -o reconstructed.png -H 'Accept: image/png'",
    ),
    Endpoint(
        "/info",
        routes.info,
        "What runs here.",
        {JSON: ref(Info)},
        (500, 503),
        example=f"curl -s {_ADDRESS}/info",
    ),
    Endpoint("/livez", routes.livez, "The process runs.", {JSON: ref(Health)}, (500,)),
    Endpoint("/readyz", routes.readyz, "The service takes work.", {JSON: ref(Health)}, (500, 503)),
    Endpoint("/metrics", routes.metrics, "Metrics.", {"text/plain": TEXT}, (500,)),
)
