"""Errors of the client, and which problem of the service each one is.

::

    DroraeError
    ├── InputError              an image, latents or an option that cannot be sent; nothing was
    ├── UnreachableError        no answer: nothing listens, the name is unknown, the connection was lost
    ├── AnswerError             an answer that is not one of this service
    └── ServiceError            the service says no; one class per kind of problem
        ├── MalformedError          400  the body is empty, truncated or not decodable
        ├── UnauthorizedError       401  no key, or a wrong one
        ├── NotFoundError           404  no such path: is the URL right?
        ├── MethodError             405  the path does not take this method
        ├── NotAcceptableError      406  the media type cannot be produced
        ├── RequestTimeoutError     408  the body came too slowly
        ├── TooLargeError           413  too many bytes, pixels or items
        ├── MediaTypeError          415  a media type that is not read
        ├── UnprocessableError      422  understood, but impossible
        │   ├── OptionError              an impossible option
        │   ├── ImageError               an image that cannot be tokenized
        │   ├── LatentsError             wrong shape, dtype or value
        │   └── ForeignCheckpointError   latents of another checkpoint
        ├── QueueFullError          429  retried until the deadline
        ├── HeadersTooLargeError    431  too many request headers, or too large ones
        ├── InternalError           500  the service's fault; its log has more under the request's id
        ├── TransferCodingError     501  a transfer coding that is not read
        ├── UnavailableError        503  loading, draining or failed; retried until the deadline
        │   └── DeviceMemoryError        the device has no memory left
        ├── DeadlineError           504  the time is up, here or there; ``__cause__`` is the last failure
        └── VersionError            505  another version of HTTP
"""

from collections.abc import Iterator
from typing import Self

PROBLEM_PREFIX = "urn:drorae:problem:"


class DroraeError(Exception):
    """Root of all errors of this package.

    Attributes:
        detail: one sentence that says what is wrong and, where it helps, what to do.
        request_id: the id that the service's log has; None where nothing was sent.
    """

    def __init__(self, detail: str, request_id: str | None = None) -> None:
        super().__init__(detail, request_id)
        self.detail = detail
        self.request_id = request_id

    def __str__(self) -> str:
        return f"{self.detail} [request {self.request_id}]" if self.request_id else self.detail


class InputError(DroraeError, ValueError):
    """An image, latents or an option that cannot be sent."""


class UnreachableError(DroraeError):
    """No answer came."""


class AnswerError(DroraeError):
    """The answer is not one of this service."""


class ServiceError(DroraeError):
    """The service says no.

    Attributes:
        status: HTTP status.
        slug: the kind of problem, the end of the problem document's ``type``.
    """

    status: int = 0
    slug: str = ""

    @classmethod
    def kinds(cls) -> Iterator[type[Self]]:
        """This class and all below it."""
        yield cls
        for kind in cls.__subclasses__():
            yield from kind.kinds()


class MalformedError(ServiceError):
    """The body does not have the format that it claims, or the image is damaged."""

    status, slug = 400, "malformed"


class UnauthorizedError(ServiceError):
    """The service wants a key: ``Client(url, api_key=...)``."""

    status, slug = 401, "unauthorized"


class NotFoundError(ServiceError):
    """There is no such path at this URL."""

    status, slug = 404, "not-found"


class MethodError(ServiceError):
    """The path does not take this method."""

    status, slug = 405, "method-not-allowed"


class NotAcceptableError(ServiceError):
    """The service cannot produce this media type."""

    status, slug = 406, "not-acceptable"


class RequestTimeoutError(ServiceError):
    """The request came too slowly."""

    status, slug = 408, "request-timeout"


class TooLargeError(ServiceError):
    """Too many bytes, pixels or items; ``info().limits`` has the limits."""

    status, slug = 413, "too-large"


class MediaTypeError(ServiceError):
    """The service does not read this media type: the file is no image, or of an unknown format."""

    status, slug = 415, "unsupported-media-type"


class UnprocessableError(ServiceError):
    """The request is well formed and cannot be honoured."""

    status, slug = 422, "unprocessable"


class OptionError(UnprocessableError):
    """An impossible option."""

    slug = "invalid-option"


class ImageError(UnprocessableError):
    """An image that was read and cannot be tokenized."""

    slug = "invalid-image"


class LatentsError(UnprocessableError):
    """Latents of the wrong shape, dtype or value."""

    slug = "invalid-latents"


class ForeignCheckpointError(UnprocessableError):
    """Latents that another checkpoint made."""

    slug = "foreign-checkpoint"


class QueueFullError(ServiceError):
    """The service has no room now."""

    status, slug = 429, "queue-full"


class HeadersTooLargeError(ServiceError):
    """The request's headers are too large."""

    status, slug = 431, "headers-too-large"


class InternalError(ServiceError):
    """A failure of the service; its log has more under the request's id."""

    status, slug = 500, "internal"


class TransferCodingError(ServiceError):
    """A transfer coding that is not read; a proxy may have chosen it."""

    status, slug = 501, "transfer-coding"


class UnavailableError(ServiceError):
    """The service loads, drains or has failed."""

    status, slug = 503, "unavailable"


class DeviceMemoryError(UnavailableError):
    """The device has no memory left."""

    slug = "out-of-memory"


class DeadlineError(ServiceError):
    """The time is up; ``__cause__`` is the failure of the last attempt, where there was one."""

    status, slug = 504, "deadline-passed"


class VersionError(ServiceError):
    """The service does not speak this version of HTTP; a proxy may have chosen it."""

    status, slug = 505, "http-version"


OF_AN_IMAGE: tuple[type[DroraeError], ...] = (
    InputError,
    MalformedError,
    TooLargeError,
    MediaTypeError,
    UnprocessableError,
    InternalError,
    DeadlineError,
)
"""Errors that one image may have while the next one is fine."""


def service_error(status: int, problem_type: str, detail: str, request_id: str | None) -> ServiceError:
    """The error for a problem document; of a kind that this version does not know a plain `ServiceError`."""
    slug = problem_type.removeprefix(PROBLEM_PREFIX)
    kind = next((kind for kind in ServiceError.kinds() if kind.slug == slug), ServiceError)
    error = kind(detail, request_id)
    error.status, error.slug = status, slug
    return error
