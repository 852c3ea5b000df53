"""Bearer keys: who may call the service, where it is not open to all."""

import hashlib
import hmac
import logging
import os
import re
import time
from collections.abc import Iterable
from pathlib import Path

from service.errors import StartError
from service.settings import ENV_PREFIX, Settings

logger = logging.getLogger(__name__)

MIN_KEY_CHARS = 16
_CHECK_INTERVAL_S = 1.0
_SCHEME = b"bearer"
_FILE_VARIABLE = f"{ENV_PREFIX}API_KEYS_FILE"

_COMMENT = re.compile(r"(^|\s)#.*")
_TOKEN = re.compile(r"[\x21-\x7e]+")  # what can follow "Bearer " in a header

_Signature = tuple[int, int, int, int]


class _KeysError(ValueError):
    """Why keys cannot be used; never the keys themselves."""


class ApiKeys:
    """The keys of the settings and of their file, which is read again when it changes.

    Only digests are kept. A file that becomes unusable leaves the keys that it last had in force, and
    the log says so.

    Raises:
        StartError: a key that is too short or holds whitespace, or a file that cannot be read or has none.
    """

    def __init__(self, settings: Settings) -> None:
        self._path = settings.api_keys_file
        self._file_digests: tuple[bytes, ...] = ()
        self._signature: _Signature | None = None
        self._problem = ""
        listed = (key.strip() for key in settings.api_keys.get_secret_value().split(","))
        try:
            self._own_digests = _digests(f"{ENV_PREFIX}API_KEYS", (key for key in listed if key))
            if self._path is not None:
                self._signature = _signature(self._path)
                self._file_digests = _read(self._path)
        except _KeysError as exc:
            raise StartError(str(exc)) from exc
        except OSError as exc:
            raise StartError(_unreadable(self._path, exc)) from exc
        self._next_check_s = time.monotonic() + _CHECK_INTERVAL_S

    @property
    def required(self) -> bool:
        """Whether clients need a key at all."""
        return bool(self._own_digests) or self._path is not None

    def allow(self, authorizations: list[bytes]) -> bool:
        """Whether a request with these ``Authorization`` headers carries a known key.

        Every key is compared, in constant time, whatever the ones before it gave.
        """
        self._refresh()
        token = _bearer_token(authorizations)
        given = hashlib.sha256(token).digest()
        known = False
        for digest in (*self._own_digests, *self._file_digests):
            known |= hmac.compare_digest(digest, given)
        return known and bool(token)

    def _refresh(self) -> None:
        now_s = time.monotonic()
        if self._path is None or now_s < self._next_check_s:
            return
        self._next_check_s = now_s + _CHECK_INTERVAL_S
        try:
            signature = _signature(self._path)
            if signature == self._signature:
                return
            digests = _read(self._path)
        except _KeysError as exc:
            self._keep_old_keys(str(exc))
        except OSError as exc:
            self._keep_old_keys(_unreadable(self._path, exc))
        else:
            logger.info("%s was read again: %d keys", self._path, len(digests))
            self._file_digests, self._signature, self._problem = digests, signature, ""

    def _keep_old_keys(self, problem: str) -> None:
        self._signature = None  # tried again at every check
        if problem != self._problem:  # but reported once
            logger.error("%s; the keys read before stay in force", problem)
            self._problem = problem


def _bearer_token(authorizations: list[bytes]) -> bytes:
    """The token of the one header; empty where there is none, or more than one."""
    if len(authorizations) != 1:
        return b""
    scheme, _, token = authorizations[0].partition(b" ")
    return token.strip(b" ") if scheme.lower() == _SCHEME else b""


def _signature(path: Path) -> _Signature:
    status = os.stat(path)
    return status.st_mtime_ns, status.st_ctime_ns, status.st_size, status.st_ino


def _read(path: Path) -> tuple[bytes, ...]:
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as exc:
        raise _KeysError(f"{_FILE_VARIABLE}: {path} is not UTF-8 text") from exc
    lines = (_COMMENT.sub("", line).strip() for line in text.splitlines())
    digests = _digests(f"{_FILE_VARIABLE}: {path}", (line for line in lines if line))
    if not digests:
        raise _KeysError(f"{_FILE_VARIABLE}: {path} has no key")
    return digests


def _digests(source: str, keys: Iterable[str]) -> tuple[bytes, ...]:
    digests = []
    for number, key in enumerate(keys, start=1):
        if not _TOKEN.fullmatch(key):
            raise _KeysError(f"{source}: key {number} holds whitespace or characters outside ASCII")
        if len(key) < MIN_KEY_CHARS:
            raise _KeysError(f"{source}: key {number} has fewer than {MIN_KEY_CHARS} characters")
        digests.append(hashlib.sha256(key.encode()).digest())
    return tuple(digests)


def _unreadable(path: Path | None, error: OSError) -> str:
    return f"{_FILE_VARIABLE}: {path} cannot be read: {error.strerror or error}"
