"""Errors to RFC 9457 problem documents. Starlette's and the model package's errors are translated here."""

import json
import logging
import secrets
from http import HTTPStatus
from typing import Any

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse

from model.errors import ModelError
from service.errors import (
    InternalError,
    MalformedError,
    MediaTypeError,
    MethodError,
    NotFoundError,
    ServiceError,
    TooLargeError,
    from_model,
)
from service.telemetry.context import RequestContext

logger = logging.getLogger(__name__)

PROBLEM_MEDIA_TYPE = "application/problem+json"
TYPE_PREFIX = "urn:drorae:problem:"

_FOREIGN_STATUSES: dict[int, type[ServiceError]] = {
    400: MalformedError,
    404: NotFoundError,
    405: MethodError,
    413: TooLargeError,
    415: MediaTypeError,
}


def translate(error: Exception, request_id: str = "") -> ServiceError:
    """The `ServiceError` for any exception; an unexpected one is logged under the id and becomes a 500."""
    if isinstance(error, ServiceError):
        return error
    if isinstance(error, HTTPException):
        return _from_http_exception(error, request_id)
    if isinstance(error, ModelError):
        return from_model(error)
    _log_unexpected("unexpected error", error, request_id)
    return InternalError("The service failed unexpectedly; its log has the details under this request_id.")


def problem(error: ServiceError, request_id: str) -> dict[str, Any]:
    """The problem document of an error."""
    return {
        "type": TYPE_PREFIX + error.slug,
        "title": error.title,
        "status": error.status,
        "detail": error.detail,
        "request_id": request_id,
    }


def problem_message(error: ServiceError) -> bytes:
    """An answer as bytes, for input that is refused before it is a request. It closes the connection."""
    request_id = secrets.token_hex(16)
    body = json.dumps(problem(error, request_id)).encode()
    headers = {
        "Content-Type": PROBLEM_MEDIA_TYPE,
        "Content-Length": str(len(body)),
        "X-Request-ID": request_id,
        **error.headers,
        "Connection": "close",
    }
    lines = (f"{name.lower()}: {value}\r\n" for name, value in headers.items())
    phrase = HTTPStatus(error.status).phrase
    return f"HTTP/1.1 {error.status} {phrase}\r\n{''.join(lines)}\r\n".encode() + body


def problem_response(error: Exception, context: RequestContext) -> JSONResponse:
    """The response for any exception; notes in ``context`` how the request came out."""
    known = translate(error, context.request_id)
    context.outcome = known.slug
    return JSONResponse(
        problem(known, context.request_id), known.status, headers=known.headers, media_type=PROBLEM_MEDIA_TYPE
    )


async def answer_http_exception(request: Request, error: Exception) -> JSONResponse:
    """Starlette's handler of its own errors, such as a path that does not exist."""
    return problem_response(error, request.state.context)


def _log_unexpected(message: str, error: Exception, request_id: str) -> None:
    logger.error("%s id=%s", message, request_id, exc_info=error, extra={"request_id": request_id})


def _from_http_exception(error: HTTPException, request_id: str) -> ServiceError:
    kind = _FOREIGN_STATUSES.get(error.status_code)
    if kind is None:
        _log_unexpected(f"unexpected HTTP status {error.status_code} from the framework", error, request_id)
        return InternalError(
            "The service failed unexpectedly; its log has the details under this request_id."
        )
    details = {
        NotFoundError: "There is nothing at this path.",
        MethodError: "This path does not take that method.",
    }
    return kind(details.get(kind, str(error.detail)), error.headers)
