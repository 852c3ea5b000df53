"""What is sent again, what is not, and until when; against answers that are told."""

import json
import pickle
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from typing import Any

import numpy as np
import pytest

import drorae_client.errors as client_errors
import service.errors as service_errors
from drorae_client import AnswerError, DeadlineError, UnreachableError, attempts
from drorae_client.errors import ServiceError
from drorae_client.wire.tensors import write_safetensors
from service.http.problems import problem_message
from tests.client.conftest import Stub, answer

LATENTS = write_safetensors("latents", np.zeros((1, 2, 1, 1), np.float16), "float16", {"model": "stub"})
GOOD = answer(LATENTS, X_Request_ID="there")
PROXY = {"Content_Type": "text/plain"}

StartStub = Callable[..., Stub]


def kinds(root: type[Any]) -> list[type[Any]]:
    return [root, *(kind for below in root.__subclasses__() for kind in kinds(below))]


UNSEEN = service_errors.DisconnectError.slug
PROBLEMS = [
    (slug, kind)
    for slug, kind in {kind.slug: kind for kind in reversed(kinds(service_errors.ServiceError))}.items()
    if slug != UNSEEN
]


def problem(kind: type[Any], retry_after: str = "1000") -> bytes:
    """The service's own bytes for a problem, which close the connection."""
    if kind.status in (429, 503):
        return problem_message(kind("It is so.", {"Retry-After": retry_after}))
    return problem_message(kind("It is so."))


@pytest.fixture(autouse=True)
def _short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attempts, "_FIRST_BACKOFF_S", 0.001)


@pytest.mark.parametrize(("slug", "kind"), PROBLEMS)
def test_every_problem_is_an_error_of_its_own(
    connect: Any, stub: StartStub, slug: str, kind: type[Any]
) -> None:
    server = stub(problem(kind))
    with pytest.raises(ServiceError) as caught:
        connect(server.url).encode(b"image")
    assert len(server.requests) == 1, "it is not sent again, or not within the deadline"
    error = caught.value
    if kind.status in (429, 503):
        assert isinstance(error, DeadlineError)
        error = error.__cause__
    assert (type(error).__name__, error.slug, error.status) == (_name_of(kind), slug, kind.status)
    assert error.detail == "It is so."
    assert len(error.request_id) == 32
    assert error.request_id in str(error)
    copy = pickle.loads(pickle.dumps(error))
    assert (type(copy), str(copy), copy.status) == (type(error), str(error), error.status)


def _name_of(kind: type[Any]) -> str:
    return {"internal": "InternalError"}.get(kind.slug, kind.__name__)


def test_the_trees_of_errors_are_alike() -> None:
    """Every class of the service that has a slug of its own has a class of that name here, below the same."""
    for slug, kind in PROBLEMS:
        ours = getattr(client_errors, _name_of(kind))
        assert (ours.slug, ours.status) == (slug, kind.status)
        if slug != "internal":  # the service's root
            assert ours.__mro__[1].__name__ == kind.__mro__[1].__name__
    known = {kind.slug for kind in ServiceError.kinds()} - {""}
    assert known == {slug for slug, _ in PROBLEMS}


def test_an_unknown_problem_is_still_one(connect: Any, stub: StartStub) -> None:
    document = {
        "type": "urn:drorae:problem:new",
        "title": "New",
        "status": 418,
        "detail": "New.",
        "request_id": "i",
    }
    server = stub(answer(json.dumps(document).encode(), 418, Content_Type="application/problem+json"))
    with pytest.raises(ServiceError) as caught:
        connect(server.url).encode(b"image")
    assert (caught.value.status, caught.value.slug, caught.value.request_id) == (418, "new", "i")


@pytest.mark.parametrize(
    "failure",
    [
        problem(service_errors.QueueFullError, "0"),
        problem(service_errors.UnavailableError, "0"),
        problem_message(service_errors.DeviceMemoryError("It is so.")),
        answer(b"no upstream", 502, **PROXY),
        answer(b"busy", 503, **PROXY),
        answer(b"Internal Server Error", 500, **PROXY),
        b"",
        b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\nConnection: close\r\n\r\nhalf",
        b"no HTTP\r\nConnection: close\r\n\r\n",
    ],
    ids=["429", "503", "memory", "502", "proxy 503", "proxy 500", "lost", "cut", "garbled"],
)
def test_what_passes_is_sent_again(connect: Any, stub: StartStub, failure: bytes) -> None:
    server = stub(failure, failure, GOOD)
    latents = connect(server.url, timeout=30).encode(b"image")
    assert (latents.model, latents.request_id) == ("stub", "there")
    assert len(server.requests) == 3
    assert len(set(server.header("X-Request-ID"))) == 1, "all attempts have one id"
    left = [float(value) for value in server.header("X-Request-Timeout")]
    assert 30 >= left[0] >= left[1] >= left[2] > 0, "what is left of the one deadline, milliseconds apart"


@pytest.mark.parametrize("status", [301, 400, 403, 404, 408, 418, 501, 504, 204])
def test_what_does_not_pass_is_not(connect: Any, stub: StartStub, status: int) -> None:
    server = stub(answer(b"<html>proxy says no</html>", status, Location="http://else.where/"))
    with pytest.raises(AnswerError) as caught:
        connect(server.url).encode(b"image")
    assert len(server.requests) == 1
    assert ("else.where" in str(caught.value)) == (status == 301)


@pytest.mark.parametrize("body", [b"", b"<html>", LATENTS[:-1]])
def test_a_good_status_with_another_body(connect: Any, stub: StartStub, body: bytes) -> None:
    with pytest.raises(AnswerError):
        connect(stub(answer(body)).url).encode(b"image")
    client = connect(stub(answer(body)).url)
    with pytest.raises(AnswerError):
        client.info()
    with pytest.raises(AnswerError):
        client.reconstruct(b"image", files="png")


@pytest.mark.parametrize("form", ["seconds", "date"])
def test_retry_after_is_honoured(connect: Any, stub: StartStub, form: str) -> None:
    later = format_datetime(datetime.now(UTC) + timedelta(seconds=2), usegmt=True)
    refusal = problem(service_errors.QueueFullError, "1" if form == "seconds" else later)
    started_s = time.monotonic()
    server = stub(refusal, GOOD)
    connect(server.url, timeout=30).encode(b"image")
    assert time.monotonic() - started_s >= 0.9  # a date has whole seconds
    if form == "seconds":
        first, second = (float(value) for value in server.header("X-Request-Timeout"))
        assert first - second >= 0.99, "what is left of the one deadline"


def test_a_silent_service_costs_no_more_than_the_deadline(connect: Any, stub: StartStub) -> None:
    silent = b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\nbegin"
    started_s = time.monotonic()
    with pytest.raises(DeadlineError) as caught:
        connect(stub(silent).url).encode(b"image", timeout=1)
    assert time.monotonic() - started_s >= 1
    assert caught.value.status == 504


def test_an_address_where_nothing_listens(connect: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """It fails soon; a service that has answered is waited for, as the restart in test_many shows."""
    monkeypatch.setattr(attempts, "PATIENCE_S", 0.2)
    with pytest.raises(UnreachableError):
        connect("http://127.0.0.1:9").encode(b"image")
    assert not connect("http://127.0.0.1:9").ready()


def test_a_timeout_must_be_some_time(connect: Any, stub: StartStub) -> None:
    server = stub(GOOD)
    with pytest.raises(DeadlineError):
        connect(server.url).encode(b"image", timeout=0)
    assert server.requests == []


def test_a_key_is_sent(connect: Any, stub: StartStub) -> None:
    server = stub(GOOD)
    connect(server.url, api_key="k" * 16).encode(b"image")
    assert server.header("Authorization") == ["Bearer " + "k" * 16]
