"""Errors of the service and how each one looks to a client.

::

    StartError                  the service cannot start; no client sees it
    ServiceError
    ├── MalformedError          400  the body is empty, truncated or not decodable
    │   └── PreflightError           a web page's origin, method or header is not allowed
    ├── UnauthorizedError       401  no key, or a wrong one
    ├── NotFoundError           404  no such path
    ├── MethodError             405  the path does not take this method
    ├── NotAcceptableError      406  none of the media types in Accept can be produced
    ├── RequestTimeoutError     408  the head or body of the request did not come in time
    ├── TooLargeError           413  too many bytes, pixels or items
    ├── MediaTypeError          415  a media type that the route does not read
    ├── UnprocessableError      422  understood, but impossible
    │   ├── OptionError              an unknown, contradictory or impossible option
    │   ├── ImageError               an image that cannot be tokenized
    │   ├── LatentsError             wrong shape, dtype or value
    │   └── ForeignCheckpointError   latents of another checkpoint
    ├── QueueFullError          429  try again later
    ├── HeadersTooLargeError    431  too many request headers, or too large ones
    ├── DisconnectError         499  the client went away; nobody sees it
    ├── InternalError           500  our fault
    ├── TransferCodingError     501  a transfer coding other than chunked
    ├── UnavailableError        503  loading, draining, or the model cannot be run
    │   └── DeviceMemoryError        the device has no memory left for the item
    ├── DeadlineError           504  the request's time is up
    └── VersionError            505  neither HTTP/1.0 nor HTTP/1.1

`service.http.problems` turns every one into an RFC 9457 problem document. Nothing of HTTP is imported here:
the decoders, which are processes of their own, raise these errors too.
"""

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from model.errors import ImageError as ModelImageError
from model.errors import LatentError, ModelError


class StartError(Exception):
    """The settings cannot be met. Its text is one sentence for stderr, without a full stop."""


class ServiceError(Exception):
    """Root of the errors that have an HTTP status.

    Args:
        detail: one sentence for the client that names the mistake and, where it helps, the remedy.
        headers: extra response headers, such as ``Retry-After``.
    """

    status: ClassVar[int] = 500
    slug: ClassVar[str] = "internal"
    title: ClassVar[str] = "Internal error"

    def __init__(self, detail: str, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(detail)
        self.detail = _sentence(detail)
        self.headers = dict(headers or {})


class MalformedError(ServiceError):
    """The body does not have the format that it claims."""

    status, slug, title = 400, "malformed", "Malformed request"


class PreflightError(MalformedError):
    """The cross-origin rules do not allow a web page's request."""


class UnauthorizedError(ServiceError):
    """The request carries no key, or none that is known."""

    status, slug, title = 401, "unauthorized", "Unauthorized"

    def __init__(self, detail: str) -> None:
        super().__init__(detail, {"WWW-Authenticate": "Bearer"})


class NotFoundError(ServiceError):
    """There is no such path."""

    status, slug, title = 404, "not-found", "Not found"


class MethodError(ServiceError):
    """The path does not take this method."""

    status, slug, title = 405, "method-not-allowed", "Method not allowed"


class NotAcceptableError(ServiceError):
    """Nothing that the client accepts can be produced."""

    status, slug, title = 406, "not-acceptable", "Not acceptable"


class RequestTimeoutError(ServiceError):
    """The client sent its request too slowly; its connection is closed."""

    status, slug, title = 408, "request-timeout", "Request timeout"

    def __init__(self, detail: str) -> None:
        super().__init__(detail, {"Connection": "close"})


class TooLargeError(ServiceError):
    """Too many bytes, pixels or items."""

    status, slug, title = 413, "too-large", "Too large"


class MediaTypeError(ServiceError):
    """The route does not read this media type."""

    status, slug, title = 415, "unsupported-media-type", "Unsupported media type"


class UnprocessableError(ServiceError):
    """The request is well formed and cannot be honoured."""

    status, slug, title = 422, "unprocessable", "Unprocessable request"


class OptionError(UnprocessableError):
    """An unknown, contradictory or impossible option."""

    slug, title = "invalid-option", "Invalid option"


class ImageError(UnprocessableError):
    """An image that was read and cannot be tokenized."""

    slug, title = "invalid-image", "Invalid image"


class LatentsError(UnprocessableError):
    """Latents of the wrong shape, dtype or value."""

    slug, title = "invalid-latents", "Invalid latents"


class ForeignCheckpointError(UnprocessableError):
    """Latents that another checkpoint made."""

    slug, title = "foreign-checkpoint", "Latents of another checkpoint"


class QueueFullError(ServiceError):
    """The queue holds as many items as it may."""

    status, slug, title = 429, "queue-full", "Queue full"


class HeadersTooLargeError(ServiceError):
    """The request line and headers have more bytes or fields than are read."""

    status, slug, title = 431, "headers-too-large", "Request headers too large"


class DisconnectError(ServiceError):
    """The client went away before its answer; the status is nginx's for that."""

    status, slug, title = 499, "disconnected", "Client went away"


class InternalError(ServiceError):
    """An error of ours; the log has the details under the request's id."""


class TransferCodingError(ServiceError):
    """The body has a transfer coding that is not read here."""

    status, slug, title = 501, "transfer-coding", "Unknown transfer coding"


class UnavailableError(ServiceError):
    """The model is loading, the service is draining, or the model cannot be run."""

    status, slug, title = 503, "unavailable", "Service unavailable"


class DeviceMemoryError(UnavailableError):
    """The device has no memory left, not even for a single item."""

    slug, title = "out-of-memory", "Out of device memory"


class DeadlineError(ServiceError):
    """The request's deadline passed."""

    status, slug, title = 504, "deadline-passed", "Deadline passed"


class VersionError(ServiceError):
    """The request's version of HTTP is not spoken here."""

    status, slug, title = 505, "http-version", "HTTP version not supported"


def overflowing(dtype: str) -> OptionError:
    """The error for numbers that are too large for the type that was asked for."""
    return OptionError(f"A number is too large for {dtype}: ask for dtype=bfloat16 or float32.")


def from_model(error: ModelError) -> ServiceError:
    """The service's error for one of the model package's, with the same sentence."""
    kinds = {LatentError: LatentsError, ModelImageError: ImageError}
    kind = next((ours for theirs, ours in kinds.items() if isinstance(error, theirs)), UnprocessableError)
    return kind(str(error))


def to_fields(error: ServiceError) -> dict[str, Any]:
    """An error as JSON, for another process."""
    return {"kind": type(error).__name__, "detail": error.detail, "headers": error.headers}


def from_fields(fields: Mapping[str, Any]) -> ServiceError:
    """The error that `to_fields` made JSON of."""
    error: ServiceError = InternalError(fields["detail"])
    kind = globals().get(fields["kind"])
    if isinstance(kind, type) and issubclass(kind, ServiceError):
        error = kind(fields["detail"])
    error.headers.update(fields["headers"])
    return error


def describe_validation(error: Mapping[str, Any], kind: Literal["option", "field"]) -> str:
    """One sentence for one of pydantic's errors, about a query option or a field of a JSON body."""
    name = ".".join(str(step) for step in error["loc"])
    if error["type"] == "extra_forbidden":
        return f"Unknown {kind} {name!r}."
    if error["type"] == "missing":
        return f"The {kind} {name!r} is missing."
    message = str(error["msg"])
    place = f"{kind} {name!r}" if name else "the JSON document"
    return f"{place}: {message[:1].lower()}{message[1:]}."


def _sentence(text: str) -> str:
    """One sentence that UTF-8 can hold, whatever a client put into it."""
    text = text.encode("utf-8", "backslashreplace").decode().strip()
    return f"{text[:1].upper()}{text[1:]}" + ("" if text.endswith((".", "!", "?")) else ".")
