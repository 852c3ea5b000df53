"""Repositories of the Hugging Face hub, or of a server that speaks its protocol, as local folders.

The library downloads, retries and keeps the cache that other programs share. This adds the choice of files,
a check of their contents, and errors of one sentence.
"""

import contextlib
import errno
import glob
import hashlib
import logging
import os
import re
import shutil
import sys
import warnings
from collections.abc import Iterable, Iterator, Sequence
from importlib.metadata import version
from pathlib import Path, PurePosixPath
from typing import Any

import httpx2
from huggingface_hub import (
    HfApi,
    constants,
    get_cached_repo_tree,
    get_token,
    hf_hub_download,
    snapshot_download,
)
from huggingface_hub.errors import (
    CachedRepoTreeNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
    RevisionResolutionError,
)
from huggingface_hub.hf_api import RepoFile, RepoFolder
from tqdm.auto import tqdm

from cli.errors import CommandError, UsageError
from cli.hub.names import SOURCES, choose_files

# The hub did not answer, or not now: the cache may serve instead.
UNREACHABLE = (OfflineModeIsEnabled, httpx2.TransportError, RevisionResolutionError)
NOT_CACHED = (LocalEntryNotFoundError, CachedRepoTreeNotFoundError, RevisionResolutionError)
FULL_DISK = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
CHECKSUM = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")
ADVICE = {
    401: "check HF_TOKEN",
    403: "set HF_TOKEN to a token that may read it",
    429: "wait some minutes, or set HF_TOKEN",
}


def pull_repository(
    name: str, revision: str | None = None, output: Path | None = None, include: Sequence[str] = ()
) -> Path:
    """Download the files of a model repository that an import needs, or find them in the cache.

    Files that are complete are not downloaded again. All files are compared with the hub's checksums.

    Args:
        name: ``ORGANIZATION/NAME``, or a name of `cli.hub.names.SOURCES`.
        revision: branch, tag or commit; by default the main branch.
        output: a folder for plain files, instead of the cache of ``HF_HOME``.
        include: patterns of the files to take, instead of those that an import needs.

    Returns:
        The folder: a snapshot in the cache, or ``output``.

    Raises:
        UsageError: no such repository, revision or file, or nothing in it to import.
        CommandError: the hub refuses or cannot be reached, or the files cannot be written.
    """
    source = SOURCES.get(name)
    if source is None and name.count("/") != 1:
        raise UsageError(f"{name}: expected ORGANIZATION/NAME, or one of {', '.join(SOURCES)}")
    repository = source.repository if source else name
    include = include or (source.files if source else ())
    if output is not None and output.exists() and not output.is_dir():
        raise UsageError(f"{output} is a file: --output names a directory")
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # its warnings repeat our errors
    with _explained(repository, revision, output):
        try:
            commit, listed = _list(repository, revision)
        except (*UNREACHABLE, HfHubHTTPError) as exc:
            if isinstance(exc, HfHubHTTPError) and exc.response.status_code < 500:
                raise
            return _from_cache(repository, revision, output, include, exc)
        chosen = choose_files(repository, list(listed), include)
        return _download(repository, commit, [listed[path] for path in chosen], output)


def _list(repository: str, revision: str | None) -> tuple[str, dict[str, RepoFile]]:
    """The commit of a revision, and its files by path."""
    api = HfApi(library_name="drorae", library_version=version("drorae"))
    try:
        # First, since it fails at once without a network; the others retry for long.
        api.model_info(repository, revision=revision, timeout=constants.HF_HUB_ETAG_TIMEOUT)
        commit = str(api.resolve_revision(repository, revision=revision).resolved)
        return commit, _files(api.list_repo_tree(repository, recursive=True, revision=commit))
    except (HFValidationError, UnicodeEncodeError):
        raise
    except (ValueError, LookupError, TypeError, AttributeError, AssertionError) as exc:
        raise CommandError(
            f"{constants.ENDPOINT}: does not answer as a Hugging Face hub does: check HF_ENDPOINT and proxies"
        ) from exc


def _files(tree: Iterable[RepoFile | RepoFolder]) -> dict[str, RepoFile]:
    """A listing by path, in order.

    Raises:
        ValueError: a path or a checksum leads out of the folder.
    """
    files = {entry.path: entry for entry in tree if isinstance(entry, RepoFile)}
    for path, file in files.items():
        if PurePosixPath(path).is_absolute() or ".." in path.split("/") or not CHECKSUM.fullmatch(_sum(file)):
            raise ValueError(f"{file} cannot be stored")
    return files


def _download(repository: str, commit: str, files: Sequence[RepoFile], output: Path | None) -> Path:
    """One file after the other, in this thread, so that an interrupt ends it at once."""
    for file in files:
        for again in (False, True):  # a file that was here may be damaged
            path = Path(
                hf_hub_download(
                    repository,
                    file.path,
                    revision=commit,
                    local_dir=output,
                    force_download=again,
                    library_name="drorae",
                    library_version=version("drorae"),
                )
            )
            if _matches(path, file):
                break
            path.resolve().unlink()
            path.unlink(missing_ok=True)
        else:
            raise CommandError(
                f"{file.path}: the download from {constants.ENDPOINT} differs from the hub's checksum: "
                f"try again, and check proxies and mirrors"
            )
    if output is not None:
        return output
    # Every file is there: this records the listing, for use without a network.
    patterns = [glob.escape(file.path) for file in files]
    revision = HfApi().resolve_revision(repository, revision=commit)
    return Path(snapshot_download(repository, revision=revision, allow_patterns=patterns, tqdm_class=_Hidden))


def _sum(file: RepoFile) -> str:
    """Checksum of the contents: SHA-256 of a large file, git's SHA-1 of another."""
    return str(file.lfs.sha256 if file.lfs else file.blob_id)


def _matches(path: Path, file: RepoFile) -> bool:
    with path.open("rb") as stream:
        if file.lfs:
            return hashlib.file_digest(stream, "sha256").hexdigest() == _sum(file)
        digest = hashlib.sha1(b"blob %d\0" % path.stat().st_size, usedforsecurity=False)
        while block := stream.read(2**20):
            digest.update(block)
        return digest.hexdigest() == _sum(file)


def _from_cache(
    repository: str, revision: str | None, output: Path | None, include: Sequence[str], reason: Exception
) -> Path:
    """The same files without the hub, where the cache has them all.

    Raises:
        Exception: ``reason``, where it lacks something.
    """
    try:
        resolved = HfApi().resolve_revision(repository, revision=revision, local_files_only=True)
        listed = _files(get_cached_repo_tree(repository, revision=resolved.resolved))
        chosen = choose_files(repository, list(listed), include)
        patterns = [glob.escape(path) for path in chosen]
        folder = Path(
            snapshot_download(
                repository,
                revision=resolved,
                allow_patterns=patterns,
                local_files_only=True,
                tqdm_class=_Hidden,
            )
        )
    except NOT_CACHED:
        raise reason from reason.__cause__
    if not constants.is_offline_mode():
        print(f"drorae: {_unreachable(reason)}; this is the copy in the cache", file=sys.stderr)
    if output is None:
        return folder
    for path in chosen:
        (output / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(folder / path, output / path)
    return output


class _Hidden(tqdm):  # type: ignore[type-arg]
    """A bar that shows nothing, where there is nothing to wait for."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{**kwargs, "disable": True})


@contextlib.contextmanager
def _explained(repository: str, revision: str | None, output: Path | None) -> Iterator[None]:
    """The library's errors as ours, each one sentence."""
    place = output or constants.HF_HUB_CACHE
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("error", "Not enough free disk space", UserWarning)
            yield
    except UserWarning as exc:
        raise CommandError(f"{place}: {exc} Free some, or choose another by --output or HF_HOME") from exc
    except HFValidationError as exc:
        raise UsageError(f"{repository}: no valid name of a repository: expected ORGANIZATION/NAME") from exc
    except HfHubHTTPError as exc:
        raise _refusal(exc, repository, revision) from exc
    except (httpx2.LocalProtocolError, UnicodeEncodeError) as exc:  # their message would show the token
        raise CommandError("HF_TOKEN: has characters that no token has") from exc
    except (OfflineModeIsEnabled, *NOT_CACHED) as exc:
        if not constants.is_offline_mode():
            raise CommandError(_unreachable(exc)) from exc
        wanted = repository if revision is None else f"{repository} at {revision}"
        raise CommandError(
            f"{wanted}: not all of it is in {constants.HF_HUB_CACHE}, and HF_HUB_OFFLINE is set: "
            f"unset it, or pull on a machine with a network"
        ) from exc
    except (httpx2.HTTPError, httpx2.InvalidURL) as exc:
        raise CommandError(_unreachable(exc)) from exc
    except OSError as exc:
        if exc.errno not in FULL_DISK:
            raise
        raise CommandError(
            f"{place}: {os.strerror(exc.errno)}: free some space, or choose another by --output or HF_HOME"
        ) from exc


def _refusal(error: HfHubHTTPError, repository: str, revision: str | None) -> CommandError:
    """What a hub's status means for the user."""
    status, endpoint = error.response.status_code, constants.ENDPOINT
    if isinstance(error, GatedRepoError):
        return CommandError(
            f"{repository}: access is restricted: accept its conditions on {endpoint}/{repository}, "
            f"and set HF_TOKEN to a token of that account"
        )
    if isinstance(error, RevisionNotFoundError):
        return UsageError(f"{repository}: has no revision {revision or constants.DEFAULT_REVISION}")
    if isinstance(error, RepositoryNotFoundError) and not (status == 401 and get_token()):
        return UsageError(
            f"{repository}: {endpoint} has no such repository, or it is private: check the name, "
            f"or set HF_TOKEN to a token that may read it"
        )
    return CommandError(
        f"{repository}: {endpoint} answered {status}: {ADVICE.get(status, 'try again later')}"
    )


def _unreachable(error: BaseException) -> str:
    cause = error.__cause__ if isinstance(error, RevisionResolutionError) and error.__cause__ else error
    if isinstance(cause, HfHubHTTPError):
        return f"{constants.ENDPOINT}: answered {cause.response.status_code}: try again later"
    reason = str(cause).strip() or type(cause).__name__
    return f"{constants.ENDPOINT}: cannot be reached ({reason}): check the network, HF_ENDPOINT and proxies"
