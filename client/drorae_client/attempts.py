"""One deadline over all attempts of a call: what is sent, what is sent again, and when.

The procedures here are generators. They yield what is to be done (`Compute`, `Send`, `Sleep`) and are sent
its outcome; `Client` and `AsyncClient` do it, each in its own way. So every rule is written once.

This is not httpx-retries 0.6: its time limit adds up the pauses alone, not the attempts; it sends one
request object again, whose X-Request-Timeout would be stale; it does not see a connection that is lost in
the middle of an answer; and it caps Retry-After instead of giving up where that leads past the deadline.
"""

import random
import time
import uuid
from collections.abc import Callable, Generator
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from functools import partial
from typing import Any, TypeAlias, TypeVar

import httpx

from drorae_client.errors import (
    OF_AN_IMAGE,
    AnswerError,
    DeadlineError,
    DroraeError,
    OptionError,
    UnreachableError,
)
from drorae_client.wire.calls import Answer, Call, encode_call, error_of, is_problem, ready_call
from drorae_client.wire.inputs import ImageInput
from drorae_client.wire.results import Latents

T = TypeVar("T")

BUSY = 429
RETRIED = (BUSY, 502, 503)
"""Statuses that are retried whoever says them; a 500 is retried where it is not the service's own."""
PATIENCE_S = 10.0
"""How long a service that never answered may be unreachable. A wrong address then fails soon."""
READY_TIMEOUT_S = 5.0
MIN_TIMEOUT_S = 0.001
MAX_BACKOFF_S = 5.0
_FIRST_BACKOFF_S = 0.1
_JITTER = 0.25
_LOST = (httpx.NetworkError, httpx.RemoteProtocolError, httpx.ConnectTimeout, httpx.ProxyError)


@dataclass(frozen=True)
class Compute:
    """Run a function that takes a while: files are read, pictures compressed. Its result is sent back."""

    function: Callable[[], Any]


@dataclass(frozen=True)
class Send:
    """Send a request and read the whole answer, in at most so many seconds.

    Sent back is an `Answer`, or the `httpx.TransportError` for which there is none.
    """

    call: Call[Any]
    request_id: str
    timeout_s: float


@dataclass(frozen=True)
class Sleep:
    """Wait so many seconds."""

    seconds: float


Procedure: TypeAlias = Generator[Compute | Send | Sleep, Any, T]
Outcome: TypeAlias = Answer | httpx.TransportError
Build: TypeAlias = Callable[[], Call[T]]
EncodeBatch: TypeAlias = Callable[..., Procedure[list[Latents | DroraeError]]]
"""`encode_batch` with its service and options."""


@dataclass
class Service:
    """What a client knows of its service.

    Attributes:
        url: its address.
        answered: whether it ever answered.
    """

    url: str
    answered: bool = False


@dataclass(frozen=True)
class Pauses:
    """What is called when a call pauses before another attempt.

    Attributes:
        begin: its argument says whether the service had no room.
        end: the pause is over.
    """

    begin: Callable[[bool], None]
    end: Callable[[], None]


def perform(
    service: Service,
    build: Build[T],
    timeout_s: float,
    pauses: Pauses | None = None,
) -> Procedure[T]:
    """Build a call and send it until it is answered.

    Args:
        service: to which it goes.
        build: makes the call.
        timeout_s: for all attempts together, from now on.
        pauses: told of every pause.

    Raises:
        DroraeError: the call cannot be built, was refused for good, or its time is up.
    """
    attempts = _Attempts(service, timeout_s)
    call: Call[T] | DroraeError = yield Compute(partial(_built, build))
    if isinstance(call, DroraeError):
        raise call
    while True:
        outcome: Outcome = yield Send(call, attempts.request_id, attempts.next_timeout_s())
        if isinstance(outcome, Answer):
            service.answered = True
            if outcome.status == 200:
                return _read(call, outcome)
        seconds = attempts.pause_s(outcome)
        if pauses:
            pauses.begin(isinstance(outcome, Answer) and outcome.status == BUSY)
        yield Sleep(seconds)
        if pauses:
            pauses.end()


def ask_ready(timeout_s: float) -> Procedure[bool]:
    """Whether the service takes work, by one attempt."""
    outcome: Outcome = yield Send(ready_call(), uuid.uuid4().hex, timeout_s)
    return isinstance(outcome, Answer) and outcome.status == 200


def encode_batch(
    service: Service,
    images: list[ImageInput],
    options: dict[str, Any],
    timeout_s: float,
    pauses: Pauses,
) -> Procedure[list[Latents | DroraeError]]:
    """One result per image. Where an image may be what is wrong, each is sent alone, so that it alone fails.

    Raises:
        DroraeError: it is not about an image.
    """
    build = partial(encode_call, images, **options)
    try:
        latents = yield from perform(service, build, timeout_s, pauses)
    except OptionError:
        raise
    except DeadlineError as error:  # time is no matter of one image
        return [error for _ in images]
    except OF_AN_IMAGE as error:
        if len(images) == 1:
            return [error]
    else:
        if len(latents) != len(images):
            raise AnswerError(f"{len(latents)} latents came for {len(images)} images", latents.request_id)
        return [*latents.split()]
    results: list[Latents | DroraeError] = []
    for image in images:
        results += yield from encode_batch(service, [image], options, timeout_s, pauses)
    return results


class _Attempts:
    """The attempts of one call. All have one id, by which the service's log shows them together."""

    def __init__(self, service: Service, timeout_s: float) -> None:
        self._service = service
        self._timeout_s = timeout_s
        self._started_s = time.monotonic()
        self._num = 0
        self.request_id = uuid.uuid4().hex

    @property
    def _left_s(self) -> float:
        return self._started_s + self._timeout_s - time.monotonic()

    def next_timeout_s(self) -> float:
        """Time for another attempt.

        Raises:
            DeadlineError: there is none.
        """
        if self._left_s < MIN_TIMEOUT_S:
            raise DeadlineError(f"there was no time left to send it within {self._timeout_s:g} s")
        self._num += 1
        return self._left_s

    def pause_s(self, outcome: Outcome) -> float:
        """How long to wait before the next attempt.

        Raises:
            DroraeError: there must not be another, or there is no time for one.
        """
        error = error_of(outcome) if isinstance(outcome, Answer) else self._unreachable(outcome)
        if not _is_retried(outcome):
            if isinstance(outcome, httpx.TimeoutException):
                raise self._out_of_time(error)
            raise error
        pause_s = _pause_s(outcome, self._num)
        never_answered = isinstance(outcome, Exception) and not self._service.answered
        if never_answered and time.monotonic() - self._started_s + pause_s > PATIENCE_S:
            raise error
        if pause_s >= self._left_s:
            raise self._out_of_time(error)
        return pause_s

    def _unreachable(self, error: httpx.TransportError) -> UnreachableError:
        reason = str(error) or type(error).__name__
        return UnreachableError(f"{self._service.url} does not answer: {reason}", self.request_id)

    def _out_of_time(self, last: DroraeError) -> DeadlineError:
        plural = "s" if self._num > 1 else ""
        error = DeadlineError(
            f"not done within {self._timeout_s:g} s, after {self._num} attempt{plural}; "
            f"the last: {last.detail}",
            self.request_id,
        )
        error.__cause__ = last
        return error


def _built(build: Build[T]) -> Call[T] | DroraeError:
    try:
        return build()
    except DroraeError as exc:
        return exc


def _read(call: Call[T], answer: Answer) -> T:
    try:
        return call.read(answer)
    except AnswerError as exc:
        raise AnswerError(exc.detail, answer.request_id) from exc


def _is_retried(outcome: Outcome) -> bool:
    if isinstance(outcome, Exception):
        return isinstance(outcome, _LOST)
    return outcome.status in RETRIED or (outcome.status == 500 and not is_problem(outcome))


def _pause_s(outcome: Outcome, num_attempts: int) -> float:
    """At least what Retry-After says, with a jitter that keeps many clients from coming back at once."""
    asked_s = _retry_after_s(outcome) if isinstance(outcome, Answer) else None
    if asked_s is not None:
        return asked_s * (1 + _JITTER * random.random())
    longest_s = min(_FIRST_BACKOFF_S * 2.0 ** min(num_attempts - 1, 10), MAX_BACKOFF_S)
    return longest_s * (1 - 0.5 * random.random())


def _retry_after_s(answer: Answer) -> float | None:
    """Retry-After, in seconds or as a date; None where it is missing or unreadable."""
    text = answer.headers.get("retry-after", "").strip()
    if text.isascii() and text.isdigit():
        return float(text)
    try:
        date = parsedate_to_datetime(text)
    except ValueError:
        return None
    return max(0.0, (date.replace(tzinfo=date.tzinfo or UTC) - datetime.now(UTC)).total_seconds())
