"""Clients that send one request after the other, and account for every answer."""

import http.client
import itertools
import threading
import time
import uuid
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from deploy.clients import Clients

TIMEOUT_S = 120
_FIRST_BYTES = 200


class Request(NamedTuple):
    """A request with a body."""

    path: str
    body: bytes


def photo_requests(folder: Path) -> list[Request]:
    """Photos to encode and to reconstruct, in turns."""
    photos = [file.read_bytes() for file in sorted(folder.glob("*.jpg"))]
    return [Request(path, photo) for photo in photos for path in ("/encode", "/reconstruct")]


class Traffic(Clients):
    """Sends requests from entering to leaving, so many at once.

    Args:
        port: on this machine.
        requests: in turns.
        in_flight: number of clients, each with one connection and one request.

    Attributes:
        outcomes: number of requests by status. Where it is none of 200 and 429, or the answer is not whole or
            not of this request, the text says what came.
        seconds: from a request to its whole answer, of those with status 200.
    """

    def __init__(self, port: int, requests: list[Request], in_flight: int) -> None:
        self.outcomes: Counter[str] = Counter()
        self.seconds: list[float] = []
        self._port, self._requests = port, requests
        self._changed = threading.Condition()
        super().__init__(in_flight)

    @property
    def total(self) -> int:
        """Answers so far."""
        return self.outcomes.total()

    def wait_for_more(self, count: int) -> None:
        """Wait until so many further answers came."""
        with self._changed:
            wanted = self.total + count
            self._changed.wait_for(lambda: self.total >= wanted)

    def _run(self, number: int) -> None:
        turn = number % len(self._requests)
        client = _Client(self._port)
        for request in self._until_stopped(self._requests[turn:] + self._requests[:turn]):
            started_s = time.monotonic()
            outcome = client.send(request)
            took_s = time.monotonic() - started_s
            with self._changed:
                self.outcomes[outcome] += 1
                if outcome == "200":
                    self.seconds.append(took_s)
                self._changed.notify_all()
            if outcome == "429":
                self._stopped.wait(client.retry_after_s)
        client.close()

    def _until_stopped(self, requests: list[Request]) -> Iterable[Request]:
        return itertools.takewhile(lambda _: not self._stopped.is_set(), itertools.cycle(requests))


class _Client:
    """One connection, kept open as long as it goes."""

    def __init__(self, port: int) -> None:
        self.retry_after_s = 1.0
        self._connection = http.client.HTTPConnection("127.0.0.1", port, timeout=TIMEOUT_S)

    def send(self, request: Request) -> str:
        """What came of it, see `Traffic.outcomes`."""
        own_id = uuid.uuid4().hex
        try:
            self._connection.request("POST", request.path, request.body, {"X-Request-ID": own_id})
            answer = self._connection.getresponse()
            body = answer.read()  # raises where it is not whole
        except (OSError, http.client.HTTPException) as error:
            self._connection.close()  # opened again by the next request
            return repr(error)
        if answer.status == http.client.OK:
            of_this = answer.headers.get("X-Request-ID") == own_id
            return "200" if of_this and body else "200, but the answer is empty or of another request"
        if answer.status == http.client.TOO_MANY_REQUESTS:
            self.retry_after_s = float(answer.headers.get("Retry-After", "1"))
            return "429"
        return f"{answer.status} {body[:_FIRST_BYTES]!r}"

    def close(self) -> None:
        self._connection.close()
