"""Bearer keys: who comes in, what changes while the service runs, what is refused at start."""

import hmac
import logging
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

from model.tokenizer import Tokenizer
from service.app import create_app
from service.errors import StartError
from service.http import keys as auth
from service.http.keys import ApiKeys
from service.settings import Settings

Check = Callable[..., dict[str, Any]]
FIRST, SECOND, THIRD = "first-key-0123456789", "second-key-0123456789", "third-key#0123456789"


class Clock:
    """Stands in for `time` in the module under test."""

    def __init__(self) -> None:
        self.now_s = 0.0

    def monotonic(self) -> float:
        return self.now_s


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(auth, "time", clock)
    return clock


def bearer(key: str) -> list[bytes]:
    return [f"Bearer {key}".encode()]


def headers(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


def test_open_without_keys() -> None:
    assert not ApiKeys(Settings()).required
    assert not ApiKeys(Settings(api_keys=" , ")).required


def test_several_keys_from_both_sources(tmp_path: Path) -> None:
    path = tmp_path / "keys"
    path.write_text(f"# the keys\n\n  {SECOND}  # of a colleague\n{THIRD}\n")
    keys = ApiKeys(Settings(api_keys=f"{FIRST}, ", api_keys_file=path))
    assert keys.required
    assert all(keys.allow(bearer(key)) for key in (FIRST, SECOND, THIRD))
    assert keys.allow([b"bEARER   " + FIRST.encode()])


@pytest.mark.parametrize(
    "authorizations",
    [
        [],
        [b""],
        [b"Bearer"],
        [b"Bearer "],
        [FIRST.encode()],
        [b"Basic " + FIRST.encode()],
        [b"Bearer " + FIRST.encode()[:-1]],
        [b"Bearer " + FIRST.encode() + b"x"],
        [b"Bearer \xff\xfe"],
        bearer(FIRST) * 2,
        bearer("of a colleague"),
    ],
)
def test_anything_else_is_refused(authorizations: list[bytes]) -> None:
    assert not ApiKeys(Settings(api_keys=f"{FIRST},{SECOND}")).allow(authorizations)


def test_every_key_is_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    compared: list[bytes] = []
    genuine = hmac.compare_digest

    def compare(known: bytes, given: bytes) -> bool:
        compared.append(known)
        return genuine(known, given)

    keys = ApiKeys(Settings(api_keys=f"{FIRST},{SECOND},{THIRD}"))
    monkeypatch.setattr(auth.hmac, "compare_digest", compare)
    assert keys.allow(bearer(FIRST))
    assert len(compared) == 3
    assert all(len(digest) == 32 for digest in compared)


def test_a_changed_file_is_read_again(tmp_path: Path, clock: Clock) -> None:
    path = tmp_path / "keys"
    path.write_text(FIRST)
    keys = ApiKeys(Settings(api_keys_file=path))
    replacement = tmp_path / "new"
    replacement.write_text(SECOND)
    replacement.replace(path)
    assert keys.allow(bearer(FIRST)), "looked at no more than once a second"
    clock.now_s += 1.0
    assert not keys.allow(bearer(FIRST))
    assert keys.allow(bearer(SECOND))


@pytest.mark.parametrize("content", ["", "# nothing\n", "short\n", "two words of sixteen\n", None])
def test_a_file_that_turns_bad_keeps_its_keys(
    tmp_path: Path, clock: Clock, caplog: pytest.LogCaptureFixture, content: str | None
) -> None:
    path = tmp_path / "keys"
    path.write_text(FIRST)
    keys = ApiKeys(Settings(api_keys_file=path))
    if content is None:
        path.unlink()
    else:
        path.write_text(content)
    for _ in range(3):
        clock.now_s += 1.0
        assert keys.allow(bearer(FIRST))
    errors = [record.getMessage() for record in caplog.records if record.levelno == logging.ERROR]
    assert len(errors) == 1, "reported once"
    assert "stay in force" in errors[0]
    assert not content or content.strip() not in errors[0]
    path.write_text(SECOND)
    clock.now_s += 1.0
    assert keys.allow(bearer(SECOND))
    assert not keys.allow(bearer(FIRST))


def test_an_unchanged_file_is_not_read(tmp_path: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "keys"
    path.write_text(FIRST)
    keys = ApiKeys(Settings(api_keys_file=path))
    monkeypatch.setattr(auth, "_read", lambda _: pytest.fail("read again"))
    for _ in range(3):
        clock.now_s += 1.0
        assert keys.allow(bearer(FIRST))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot be read: No such file or directory"),
        (b"# none\n", "has no key"),
        (b"0123456789abcde\n", "key 1 has fewer than 16 characters"),
        (b"0123456789abcdef\nsecret key of many words\n", "key 2 holds whitespace"),
        (b"\xff\xfe0123456789abcdef", "is not UTF-8 text"),
    ],
)
def test_a_bad_file_is_an_error_at_start(tmp_path: Path, content: bytes | None, message: str) -> None:
    path = tmp_path / "keys"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(StartError, match=message) as caught:
        create_app(Settings(api_keys_file=path))
    sentence = str(caught.value)
    assert sentence.startswith(f"DRORAE_API_KEYS_FILE: {path} ") or "key" in sentence
    assert "\n" not in sentence
    assert "secret" not in sentence


def test_a_directory_is_no_key_file(tmp_path: Path) -> None:
    with pytest.raises(StartError, match="cannot be read: Is a directory"):
        ApiKeys(Settings(api_keys_file=tmp_path))


@pytest.mark.parametrize("key", ["tooshort", "spaces in the middle", "schlüssel-0123456789"])
def test_a_bad_key_is_an_error_at_start(key: str) -> None:
    with pytest.raises(StartError, match=r"^DRORAE_API_KEYS: key 2 ") as caught:
        ApiKeys(Settings(api_keys=f"{FIRST},{key}"))
    assert key not in str(caught.value)


def test_over_a_socket(
    serve: Any, tokenizer: Tokenizer, png: bytes, check_problem: Check, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    with serve(create_app(Settings(api_keys=f"{FIRST},{SECOND}"), tokenizer)) as running:
        client: httpx.Client = running.client
        for path in ("/livez", "/readyz"):
            assert client.get(path).status_code == client.head(path).status_code == 200
        for method, path in (
            *(("GET", path) for path in ("/metrics", "/openapi.json", "/info", "/nowhere")),
            *(("POST", path) for path in ("/encode", "/decode", "/reconstruct")),
            ("OPTIONS", "/encode"),
        ):
            for key in ({}, headers("wrong-key-0123456789")):
                response = client.request(method, path, headers=key)
                problem = check_problem(response, 401, "unauthorized", "Bearer")
                assert response.headers["www-authenticate"] == "Bearer"
                assert "wrong" not in str(problem)
        for path in ("/metrics", "/docs", "/openapi.json", "/info"):
            assert client.get(path, headers=headers(SECOND)).status_code == 200
        assert client.post("/encode", content=png, headers=headers(FIRST)).status_code == 200
        told = client.get("/metrics", headers=headers(FIRST)).text
        told += client.get("/info", headers=headers(FIRST)).text
        assert 'drorae_requests_total{outcome="unauthorized",route="/encode"}' in told
    for key in (FIRST, SECOND, "wrong-key-0123456789"):
        assert key not in told
        assert key not in caplog.text


def test_refused_before_the_body(serve: Any, tokenizer: Tokenizer) -> None:
    """The 401 comes although the announced body never does."""
    with serve(create_app(Settings(api_keys=FIRST), tokenizer)) as running:
        address = running.client.base_url.host, running.client.base_url.port
        with socket.create_connection(address, timeout=30) as connection:
            connection.sendall(b"POST /encode HTTP/1.1\r\nHost: x\r\nContent-Length: 1000000\r\n\r\n")
            assert connection.recv(12) == b"HTTP/1.1 401"


def test_the_document_says_who_needs_a_key(serve: Any, tokenizer: Tokenizer) -> None:
    with serve(create_app(Settings(api_keys=FIRST), tokenizer)) as running:
        document = running.client.get("/openapi.json", headers=headers(FIRST)).json()
    assert document["components"]["securitySchemes"] == {"key": {"type": "http", "scheme": "bearer"}}
    for path, operations in document["paths"].items():
        for operation in operations.values():
            is_public = path in ("/livez", "/readyz")
            assert ("security" in operation) is not is_public
            assert ("401" in operation["responses"]) is not is_public
