"""What the OpenAPI document says of each route beyond its query options."""

from collections.abc import Iterable, Mapping
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from service.codecs.media_types import JPEG, JSON, NPY, PNG, RAW, SAFETENSORS, WEBP, ZIP
from service.codecs.requests import IMAGE_MEDIA_TYPES
from service.codecs.schemas import (
    Health,
    ImagesIn,
    Info,
    LatentsIn,
    LatentsOut,
    PicturesOut,
    Problem,
    ReconstructionsOut,
)
from service.http.middleware import PUBLIC_PATHS, TIMEOUT_HEADER, TIMEOUT_PATTERN
from service.http.problems import PROBLEM_MEDIA_TYPE

JsonObject = dict[str, Any]

_DOCUMENTS: tuple[type[BaseModel], ...] = (
    *(Health, Info, Problem),
    *(ImagesIn, LatentsIn),
    *(LatentsOut, PicturesOut, ReconstructionsOut),
)
_REF_TEMPLATE = "#/components/schemas/{model}"
_BINARY: JsonObject = {"type": "string", "format": "binary"}
_TEXT: JsonObject = {"type": "string"}

_PROBLEMS = {
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
_HEADERS: JsonObject = {
    "X-Request-ID": {"description": "The request's id: the client's own or a fresh one.", "schema": _TEXT},
    "Server-Timing": {"description": "Milliseconds by stage.", "schema": _TEXT},
    "traceparent": {"description": "The request's span, as W3C trace context.", "schema": _TEXT},
}
_TENSOR_HEADERS: JsonObject = {
    **_HEADERS,
    "shape": {"description": "Shape of a tensor answer, a JSON list.", "schema": _TEXT},
    "dtype": {"description": "Type of a tensor answer's numbers.", "schema": _TEXT},
}
_CHALLENGE: JsonObject = {"WWW-Authenticate": {"description": "Always `Bearer`.", "schema": _TEXT}}
_TIMEOUT: JsonObject = {
    "name": TIMEOUT_HEADER,
    "in": "header",
    "required": False,
    "description": "Seconds from the request's first byte to its answer, at most what the service allows; "
    "504 after.",
    "schema": {"type": "string", "pattern": TIMEOUT_PATTERN},
}
_RETRY_AFTER: JsonObject = {"Retry-After": {"description": "Seconds to wait.", "schema": {"type": "integer"}}}


def _ref(document: type[BaseModel]) -> JsonObject:
    return {"$ref": _REF_TEMPLATE.format(model=document.__name__)}


def _content(schemas: Mapping[str, JsonObject]) -> JsonObject:
    return {media_type: {"schema": schema} for media_type, schema in schemas.items()}


def _responses(
    description: str, content: JsonObject, headers: JsonObject, problems: Iterable[int]
) -> JsonObject:
    responses: JsonObject = {"200": {"description": description, "content": content, "headers": headers}}
    for status in problems:
        extra = _RETRY_AFTER if status in (429, 503) else {}
        responses[str(status)] = {
            "description": _PROBLEMS[status],
            "content": _content({PROBLEM_MEDIA_TYPE: _ref(Problem)}),
            "headers": {**_HEADERS, **extra},
        }
    return responses


def _operation(responses: JsonObject, body: JsonObject | None = None) -> JsonObject:
    """Keyword arguments of a route; the answer's type is the handler's own business."""
    extra: JsonObject = {}
    if body:
        extra = {"requestBody": {"required": True, "content": body}, "parameters": [_TIMEOUT]}
    return {"responses": responses, "openapi_extra": extra, "response_model": None}


_MULTIPART_IMAGES: JsonObject = {
    "type": "object",
    "properties": {"images": {"type": "array", "items": _BINARY, "minItems": 1}},
    "required": ["images"],
    "additionalProperties": False,
}
_IMAGE_BODY = _content(
    {
        **dict.fromkeys(IMAGE_MEDIA_TYPES, _BINARY),
        "multipart/form-data": _MULTIPART_IMAGES,
        JSON: _ref(ImagesIn),
        RAW: _BINARY,
        "application/octet-stream": _BINARY,
    }
)
_LATENT_BODY = _content(
    {
        SAFETENSORS: _BINARY,
        NPY: _BINARY,
        JSON: _ref(LatentsIn),
        RAW: _BINARY,
        "application/octet-stream": _BINARY,
    }
)
_LATENT_ANSWER = _content({SAFETENSORS: _BINARY, NPY: _BINARY, JSON: _ref(LatentsOut), RAW: _BINARY})


def _picture_answer(document: type[BaseModel]) -> JsonObject:
    binary = dict.fromkeys((PNG, JPEG, WEBP, ZIP, SAFETENSORS, NPY, RAW), _BINARY)
    return _content({**binary, JSON: _ref(document)})


ENCODE = _operation(
    _responses("Latents [N, C, h, w].", _LATENT_ANSWER, _TENSOR_HEADERS, _PROBLEMS),
    _IMAGE_BODY,
)
DECODE = _operation(
    _responses(
        "One picture, a zip of several, or a tensor.",
        _picture_answer(PicturesOut),
        _TENSOR_HEADERS,
        _PROBLEMS,
    ),
    _LATENT_BODY,
)
RECONSTRUCT = _operation(
    _responses(
        "One picture, a zip of several, or a tensor.",
        _picture_answer(ReconstructionsOut),
        _TENSOR_HEADERS,
        _PROBLEMS,
    ),
    _IMAGE_BODY,
)
INFO = _operation(_responses("What runs here.", _content({JSON: _ref(Info)}), _HEADERS, (500, 503)))
LIVEZ = _operation(_responses("The process runs.", _content({JSON: _ref(Health)}), _HEADERS, (500,)))
READYZ = _operation(
    _responses("The service takes work.", _content({JSON: _ref(Health)}), _HEADERS, (500, 503))
)
METRICS = _operation(_responses("Metrics.", _content({"text/plain": _TEXT}), _HEADERS, (500,)))


def install_openapi(app: FastAPI, keys_required: bool = False) -> None:
    """Make ``app.openapi()`` include the documents that the routes above refer to, and who needs a key."""

    def build() -> JsonObject:
        if app.openapi_schema is None:
            schema = get_openapi(
                title=app.title, version=app.version, description=app.description, routes=app.routes
            )
            _, definitions = models_json_schema(
                [(document, "validation") for document in _DOCUMENTS], ref_template=_REF_TEMPLATE
            )
            schemas = schema.setdefault("components", {}).setdefault("schemas", {})
            schemas.update(definitions["$defs"])
            for unused in ("HTTPValidationError", "ValidationError"):
                schemas.pop(unused, None)
            if keys_required:
                _require_keys(schema)
            app.openapi_schema = schema
        return app.openapi_schema

    app.openapi = build  # type: ignore[method-assign]


def _require_keys(schema: JsonObject) -> None:
    schema["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
    for path, operations in schema["paths"].items():
        if path in PUBLIC_PATHS:
            continue
        for operation in operations.values():
            operation["security"] = [{"key": []}]
            operation["responses"]["401"] = {
                "description": "No key, or one that is not known here.",
                "content": _content({PROBLEM_MEDIA_TYPE: _ref(Problem)}),
                "headers": {**_HEADERS, **_CHALLENGE},
            }
