"""The OpenAPI document: the table of routes, put into words."""

import inspect
from collections.abc import Iterator

from pydantic.json_schema import models_json_schema

from service.api.endpoints import ENDPOINTS, PROBLEMS, REF_TEMPLATE, TEXT, Endpoint, JsonObject, Schemas, ref
from service.codecs.schemas import (
    CommonOptions,
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

_DESCRIPTION = (
    "Image tokenizer: images to latents, enriched by fusing the layers of a frozen vision transformer, "
    "and back. "
    "Formats are chosen by `Accept` or `?format=`. Errors are problem documents (RFC 9457)."
)
_DOCUMENTS = (Health, Info, Problem, ImagesIn, LatentsIn, LatentsOut, PicturesOut, ReconstructionsOut)
_NO_KEY = "No key, or one that is not known here."
_HEADERS: JsonObject = {
    "X-Request-ID": {"description": "The request's id: the client's own or a fresh one.", "schema": TEXT},
    "Server-Timing": {"description": "Milliseconds by stage.", "schema": TEXT},
    "traceparent": {
        "description": "The request's span (W3C), with drorae[otel].",
        "schema": TEXT,
    },
}
_TENSOR_HEADERS: JsonObject = {
    **_HEADERS,
    "shape": {"description": "Shape of a tensor answer, a JSON list.", "schema": TEXT},
    "dtype": {"description": "Type of a tensor answer's numbers.", "schema": TEXT},
}
_CHALLENGE: JsonObject = {"WWW-Authenticate": {"description": "Always `Bearer`.", "schema": TEXT}}
_TIMEOUT: JsonObject = {
    "name": TIMEOUT_HEADER,
    "in": "header",
    "required": False,
    "description": "Seconds from the request's first byte to its answer, at most what the service allows; "
    "504 after.",
    "schema": {"type": "string", "pattern": TIMEOUT_PATTERN},
}
_RETRY_AFTER: JsonObject = {"Retry-After": {"description": "Seconds to wait.", "schema": {"type": "integer"}}}


def describe(version: str, keys_required: bool = False) -> JsonObject:
    """The OpenAPI document.

    Args:
        version: of the service.
        keys_required: whether clients need a key.
    """
    _, definitions = models_json_schema(
        [(document, "validation") for document in _DOCUMENTS], ref_template=REF_TEMPLATE
    )
    components: JsonObject = {"schemas": definitions["$defs"]}
    if keys_required:
        components["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
    return {
        "openapi": "3.1.0",
        "info": {"title": "DRoRAE", "description": _DESCRIPTION, "version": version},
        "paths": {
            endpoint.path: {
                endpoint.method.lower(): _describe_endpoint(
                    endpoint, keys_required and endpoint.path not in PUBLIC_PATHS
                )
            }
            for endpoint in ENDPOINTS
        },
        "components": components,
    }


def _describe_endpoint(endpoint: Endpoint, needs_key: bool) -> JsonObject:
    headers = _TENSOR_HEADERS if endpoint.options else _HEADERS
    good = {"description": endpoint.summary, "content": _content(endpoint.answers), "headers": headers}
    name = endpoint.path.removeprefix("/")
    description: JsonObject = {
        "summary": name.capitalize(),
        "description": _describe_handler(endpoint),
        "operationId": name,
        "responses": {"200": good} | {str(status): _problem(status) for status in endpoint.problems},
    }
    if endpoint.options is not None:
        description["parameters"] = [*_parameters(endpoint.options), _TIMEOUT]
    if endpoint.bodies:
        description["requestBody"] = {"required": True, "content": _content(endpoint.bodies)}
    if needs_key:
        description["security"] = [{"key": []}]
        description["responses"]["401"] = _problem(401)
    return description


def _describe_handler(endpoint: Endpoint) -> str:
    """The handler's docstring and the example, as Markdown."""
    example = f"\n\n```sh\n{endpoint.example}\n```" if endpoint.example else ""
    return f"{inspect.getdoc(endpoint.handler)}{example}"


def _parameters(options: type[CommonOptions]) -> Iterator[JsonObject]:
    for name, schema in options.model_json_schema()["properties"].items():
        shown = {key: value for key, value in schema.items() if (key, value) != ("default", None)}
        yield {
            "name": name,
            "in": "query",
            "required": False,
            "description": schema["description"],
            "schema": shown,
        }


def _problem(status: int) -> JsonObject:
    extra = {401: _CHALLENGE, 429: _RETRY_AFTER, 503: _RETRY_AFTER}.get(status, {})
    return {
        "description": PROBLEMS.get(status, _NO_KEY),
        "content": _content({PROBLEM_MEDIA_TYPE: ref(Problem)}),
        "headers": {**_HEADERS, **extra},
    }


def _content(schemas: Schemas) -> JsonObject:
    return {media_type: {"schema": schema} for media_type, schema in schemas.items()}
