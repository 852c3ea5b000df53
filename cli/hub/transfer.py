"""One file from a hub to a path: resumed where an earlier attempt stopped, verified, and put in place whole.

The library's own downloads start a file again when a process was interrupted, and compare its size alone.
"""

import contextlib
import errno
import fcntl
import hashlib
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from io import FileIO
from pathlib import Path

import httpx2
from huggingface_hub import constants, get_session, hf_raise_for_status
from huggingface_hub.errors import HfHubHTTPError

from cli.errors import CommandError

# Waits between attempts that brought not a byte; one that brought some starts again from the first.
WAITS_S = (1.0, 2.0, 4.0, 8.0, 8.0)
TRANSIENT_STATUSES = frozenset({408, 429, 500, 502, 503, 504})
TRANSIENT_ERRORS = (httpx2.TimeoutException, httpx2.NetworkError, httpx2.RemoteProtocolError)
FULL_DISK = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})


@dataclass(frozen=True)
class RemoteFile:
    """A file of a repository, as the hub lists it."""

    path: str
    size_bytes: int
    git_oid: str
    """SHA-1 of the git blob; of the pointer, not of the contents, where ``sha256`` is known."""
    sha256: str | None = None
    """Of the contents, for a file in large file storage."""

    @property
    def etag(self) -> str:
        """What the hub's cache calls the contents."""
        return self.sha256 or self.git_oid

    def matches(self, path: Path) -> bool:
        """Whether a local file has the contents that the hub lists."""
        if not path.is_file() or path.stat().st_size != self.size_bytes:
            return False
        with path.open("rb") as file:
            if self.sha256:
                return hashlib.file_digest(file, "sha256").hexdigest() == self.sha256
            digest = hashlib.sha1(b"blob %d\0" % self.size_bytes, usedforsecurity=False)
            while block := file.read(2**20):
                digest.update(block)
            return digest.hexdigest() == self.git_oid


def fetch(
    url: str,
    headers: dict[str, str],
    file: RemoteFile,
    partial: Path,
    destination: Path,
    on_bytes: Callable[[int], object],
) -> None:
    """Download a file, continuing what ``partial`` holds of it.

    ``partial`` is kept when the connection fails for good or the user interrupts, and removed when its
    contents turn out wrong or the disk is full. ``destination`` appears only complete and verified.

    Args:
        url: where it is; redirects are followed, and the token stays with the first host.
        headers: of every request.
        file: what is expected.
        partial: a name on the same file system as ``destination``.
        destination: the final name; replaced if it exists.
        on_bytes: told how many bytes were added; negative where some must be fetched again.

    Raises:
        CommandError: the contents are not those listed, the disk is full, or another process is at it.
        HfHubHTTPError: the hub refuses.
        httpx2.TransportError: the connection failed too often.
    """
    try:
        partial.parent.mkdir(parents=True, exist_ok=True)
        destination.parent.mkdir(parents=True, exist_ok=True)
        with _locked(partial) as output:
            _complete(url, headers, file, output, on_bytes)
            os.fsync(output.fileno())
            if not file.matches(partial):
                partial.unlink()
                raise CommandError(
                    f"{file.path}: what {url} sent is not what the hub lists (size or checksum differ): "
                    f"try again, and check proxies and mirrors"
                )
            os.replace(partial, destination)
    except OSError as exc:
        if exc.errno not in FULL_DISK:
            raise
        with contextlib.suppress(OSError):
            partial.unlink()
        raise CommandError(
            f"{destination.parent}: {os.strerror(exc.errno)} while writing {file.path} "
            f"({shown_bytes(file.size_bytes)}): free some space, or choose another by --output or HF_HOME"
        ) from exc
    finally:
        with contextlib.suppress(OSError):
            if not partial.stat().st_size:
                partial.unlink()


def shown_bytes(num_bytes: int) -> str:
    """A size for people, such as 1.7 GB."""
    size, unit = float(num_bytes), "B"
    for larger in ("kB", "MB", "GB", "TB"):
        if size < 999.5:
            break
        size, unit = size / 1000, larger
    return f"{size:.3g} {unit}"


@contextlib.contextmanager
def _locked(partial: Path) -> Iterator[FileIO]:
    """The partial file, open for appending and held by this process alone."""
    while True:
        with partial.open("ab", buffering=0) as output:
            try:
                fcntl.flock(output, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as exc:
                raise CommandError(f"{partial}: another process is downloading this file") from exc
            if _is_still(partial, output):
                yield output
                return


def _is_still(partial: Path, output: FileIO) -> bool:
    """Whether the name is of the open file, and not gone since another process completed it."""
    try:
        return os.path.samestat(partial.stat(), os.fstat(output.fileno()))
    except FileNotFoundError:
        return False


def _complete(
    url: str, headers: dict[str, str], file: RemoteFile, output: FileIO, on_bytes: Callable[[int], object]
) -> None:
    """Append what is missing, in as many attempts as bring something."""
    have = _size(output)
    if have > file.size_bytes:
        output.truncate(have := 0)
    on_bytes(have)
    num_futile = 0
    while have < file.size_bytes:
        error: httpx2.HTTPError
        try:
            _append(url, headers, file, output, on_bytes)
            error = httpx2.RemoteProtocolError("the connection was closed before the end of the file")
        except TRANSIENT_ERRORS as exc:
            error = exc
        except HfHubHTTPError as exc:
            if exc.response.status_code not in TRANSIENT_STATUSES:
                raise
            error = exc
        before, have = have, _size(output)
        if have < file.size_bytes:
            num_futile = 0 if have > before else num_futile + 1
            if num_futile > len(WAITS_S):
                raise error
            time.sleep(WAITS_S[max(0, num_futile - 1)])


def _append(
    url: str, headers: dict[str, str], file: RemoteFile, output: FileIO, on_bytes: Callable[[int], object]
) -> None:
    """One request for the rest of the file."""
    have = _size(output)
    headers = {**headers, "Accept-Encoding": "identity"}  # a range is of the bytes as they are stored
    if have:
        headers["Range"] = f"bytes={have}-"
    timeout_s = constants.HF_HUB_DOWNLOAD_TIMEOUT
    with get_session().stream("GET", url, headers=headers, timeout=timeout_s) as response:
        hf_raise_for_status(response)
        if have and response.status_code != 206:  # the whole file, from a server that knows no ranges
            output.truncate(0)
            on_bytes(-have)
        for chunk in response.iter_raw():  # as it arrives, so that a cut connection loses nothing
            rest = memoryview(chunk)
            while rest:
                rest = rest[output.write(rest) :]
            on_bytes(len(chunk))
            if _size(output) > file.size_bytes:
                return


def _size(output: FileIO) -> int:
    return os.fstat(output.fileno()).st_size
