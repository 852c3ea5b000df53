"""Repositories of the Hugging Face hub, or of another server that speaks its protocol, as local folders.

The library lists and keeps the cache, which other programs share; ``cli.hub.transfer`` moves the bytes.
"""

import contextlib
import glob
import logging
import os
import re
import shutil
import sys
import uuid
from collections.abc import Iterable, Iterator, Sequence
from importlib.metadata import version
from pathlib import Path, PurePosixPath
from typing import Any

import httpx2
from huggingface_hub import (
    HfApi,
    ResolvedRevision,
    constants,
    get_cached_repo_tree,
    get_token,
    hf_hub_url,
    snapshot_download,
)
from huggingface_hub.errors import (
    CachedRepoTreeNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
    RevisionResolutionError,
)
from huggingface_hub.file_download import repo_folder_name
from huggingface_hub.hf_api import RepoFile, RepoFolder
from tqdm.auto import tqdm

from cli.errors import CommandError, UsageError
from cli.hub.names import SOURCES, choose_files
from cli.hub.transfer import RemoteFile, fetch, shown_bytes

# The hub did not answer, or not now: what the cache holds may serve instead.
UNREACHABLE = (OfflineModeIsEnabled, httpx2.TransportError, RevisionResolutionError)
Targets = dict[Path, tuple[RemoteFile, Path]]  # by the final name: what, and the name until it is complete
CHECKSUM = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")
NOT_CACHED = (LocalEntryNotFoundError, CachedRepoTreeNotFoundError, RevisionResolutionError)


def pull_repository(
    name: str, revision: str | None = None, output: Path | None = None, include: Sequence[str] = ()
) -> Path:
    """Download what an import needs of a model repository, or find it in the cache.

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
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # what goes wrong is told once, by us
    with _explained(repository, revision):
        try:
            return _pull(repository, revision, output, include)
        except (*UNREACHABLE, HfHubHTTPError) as exc:
            if isinstance(exc, HfHubHTTPError) and exc.response.status_code < 500:
                raise
            try:
                folder = _pull_cached(repository, revision, output, include)
            except NOT_CACHED:
                raise exc from exc.__cause__
            if not constants.is_offline_mode():
                print(f"drorae: {_unreachable(exc)}; this is the copy in the cache", file=sys.stderr)
            return folder


def _pull(repository: str, revision: str | None, output: Path | None, include: Sequence[str]) -> Path:
    resolved, listed = _list(repository, revision)
    chosen = [listed[path] for path in choose_files(repository, list(listed), include)]
    snapshot = _snapshot(repository, resolved.resolved)
    if output is None:
        blobs = snapshot.parents[1] / "blobs"
        missing = [file for file in chosen if not (snapshot / file.path).exists()]
        missing = [file for file in missing if not (blobs / file.etag).exists()]
        targets = {blobs / file.etag: (file, blobs / f"{file.etag}.incomplete") for file in missing}
    else:
        missing = [file for file in chosen if not _take_cached(file, snapshot, output)]
        targets = {output / file.path: (file, _hidden(output / file.path, file)) for file in missing}
    _fetch_all(repository, resolved.resolved, targets)
    if output is not None:
        return output
    # Every file is there: this links them into the snapshot, and records the listing for offline use.
    patterns = [glob.escape(file.path) for file in chosen]
    return Path(snapshot_download(repository, revision=resolved, allow_patterns=patterns, tqdm_class=_Hidden))


def _list(repository: str, revision: str | None) -> tuple[ResolvedRevision, dict[str, RemoteFile]]:
    """The commit that a revision stands for, and its files by path."""
    api = HfApi(library_name="drorae", library_version=version("drorae"))
    try:
        # First, since it fails at once without a network; the others try for long, or turn to the cache.
        api.model_info(repository, revision=revision, timeout=constants.HF_HUB_ETAG_TIMEOUT)
        resolved = api.resolve_revision(repository, revision=revision)
        return resolved, _remote_files(
            api.list_repo_tree(repository, recursive=True, revision=resolved.resolved)
        )
    except (HFValidationError, UnicodeEncodeError):
        raise
    except (ValueError, LookupError, TypeError, AttributeError, AssertionError) as exc:
        raise CommandError(
            f"{_endpoint()}: does not answer as a Hugging Face hub does: check HF_ENDPOINT and proxies"
        ) from exc


def _pull_cached(repository: str, revision: str | None, output: Path | None, include: Sequence[str]) -> Path:
    """The same without the hub.

    Raises:
        LocalEntryNotFoundError, CachedRepoTreeNotFoundError, RevisionResolutionError: it lacks something.
    """
    resolved = HfApi().resolve_revision(repository, revision=revision, local_files_only=True)
    listed = _remote_files(get_cached_repo_tree(repository, revision=resolved.resolved))
    chosen = choose_files(repository, list(listed), include)
    patterns = [glob.escape(path) for path in chosen]
    folder = snapshot_download(
        repository, revision=resolved, allow_patterns=patterns, local_files_only=True, tqdm_class=_Hidden
    )
    if output is None:
        return Path(folder)
    for path in chosen:
        _take_cached(listed[path], Path(folder), output)
    return output


def _remote_files(tree: Iterable[RepoFile | RepoFolder]) -> dict[str, RemoteFile]:
    """A listing by path, in order.

    Raises:
        ValueError: a name or a checksum that would lead out of the folder that it is for.
    """
    files = {}
    for entry in tree:
        if isinstance(entry, RepoFile):
            size, sha256 = (entry.lfs.size, entry.lfs.sha256) if entry.lfs else (entry.size, None)
            file = RemoteFile(entry.path, size, entry.blob_id, sha256)
            path = PurePosixPath(file.path)
            if path.is_absolute() or ".." in path.parts or not CHECKSUM.fullmatch(file.etag):
                raise ValueError(f"{file} cannot be stored")
            files[file.path] = file
    return files


def _fetch_all(repository: str, commit: str, targets: Targets) -> None:
    """Download files one after another, the smallest first, with one progress bar."""
    if not targets:
        return
    total = sum(file.size_bytes for file, _ in targets.values())
    _check_room(total, targets)
    headers = {"user-agent": f"drorae/{version('drorae')}"}
    if token := get_token():
        headers["authorization"] = f"Bearer {token}"
    hidden = not sys.stderr.isatty() or bool(constants.HF_HUB_DISABLE_PROGRESS_BARS)
    with tqdm(total=total, unit="B", unit_scale=True, file=sys.stderr, disable=hidden) as bar:
        for destination, (file, partial) in sorted(targets.items(), key=lambda item: item[1][0].size_bytes):
            bar.set_description(file.path.rpartition("/")[2])
            url = hf_hub_url(repository, file.path, revision=commit, endpoint=constants.ENDPOINT)
            fetch(url, headers, file, partial, destination, bar.update)


def _check_room(total: int, targets: Targets) -> None:
    """Refuse at once what cannot fit, instead of after gigabytes."""
    partials = [partial for _, partial in targets.values()]
    have = sum(partial.stat().st_size for partial in partials if partial.exists())
    folder = next(parent for parent in partials[0].absolute().parents if parent.exists())
    free = shutil.disk_usage(folder).free
    if total - have > free:
        raise CommandError(
            f"{folder}: {shown_bytes(total - have)} are to be downloaded and {shown_bytes(free)} are free: "
            f"free some space, or choose another disk by --output or HF_HOME"
        )


def _take_cached(file: RemoteFile, snapshot: Path, output: Path) -> bool:
    """Whether ``output`` has the file already, or has it now from the cache."""
    if file.matches(output / file.path):
        return True
    if not (snapshot / file.path).is_file():
        return False
    destination = output / file.path
    destination.parent.mkdir(parents=True, exist_ok=True)
    partial = destination.with_name(f".{destination.name}.{uuid.uuid4().hex}.partial")
    try:
        shutil.copyfile(snapshot / file.path, partial)
        os.replace(partial, destination)
    finally:
        partial.unlink(missing_ok=True)
    return True


def _hidden(destination: Path, file: RemoteFile) -> Path:
    return destination.with_name(f".{destination.name}.{file.etag[:16]}.incomplete")


def _snapshot(repository: str, commit: str) -> Path:
    """Where the cache has, or would have, a commit's files."""
    folder = repo_folder_name(repo_id=repository, repo_type=constants.REPO_TYPE_MODEL)
    return Path(constants.HF_HUB_CACHE).expanduser() / folder / "snapshots" / commit


class _Hidden(tqdm):  # type: ignore[type-arg]
    """A bar that shows nothing, where there is nothing to wait for."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{**kwargs, "disable": True})


@contextlib.contextmanager
def _explained(repository: str, revision: str | None) -> Iterator[None]:
    """The library's errors as ours, each one sentence."""
    try:
        yield
    except HFValidationError as exc:
        raise UsageError(f"{repository}: no valid name of a repository: expected ORGANIZATION/NAME") from exc
    except HfHubHTTPError as exc:
        raise _refusal(exc, repository, revision) from exc
    except (httpx2.LocalProtocolError, UnicodeEncodeError) as exc:  # their message would show the token
        raise CommandError("HF_TOKEN: has characters that no token has") from exc
    except (OfflineModeIsEnabled, *NOT_CACHED) as exc:
        if not constants.is_offline_mode():
            raise CommandError(_unreachable(exc)) from exc
        what = repository if revision is None else f"{repository} at {revision}"
        raise CommandError(
            f"{what}: not all of it is in {constants.HF_HUB_CACHE}, and HF_HUB_OFFLINE is set: "
            f"unset it, or pull on a machine with a network"
        ) from exc
    except (httpx2.HTTPError, httpx2.InvalidURL) as exc:
        raise CommandError(_unreachable(exc)) from exc


def _refusal(error: HfHubHTTPError, repository: str, revision: str | None) -> CommandError:
    """What a hub's status means for the user."""
    status, endpoint = error.response.status_code, _endpoint()
    if isinstance(error, GatedRepoError):
        return CommandError(
            f"{repository}: access is restricted: accept its conditions on {endpoint}/{repository}, "
            f"and set HF_TOKEN to a token of that account"
        )
    if isinstance(error, RevisionNotFoundError):
        return UsageError(f"{repository}: has no revision {revision or constants.DEFAULT_REVISION}")
    if isinstance(error, RemoteEntryNotFoundError):
        return UsageError(f"{repository}: has no file {error.response.url.path.rpartition('/')[2]}")
    if status == 401 and get_token():
        return CommandError(f"{repository}: {endpoint} refuses the token (401): check HF_TOKEN")
    if isinstance(error, RepositoryNotFoundError) or status in (401, 404):
        return UsageError(
            f"{repository}: {endpoint} has no such repository, or it is private: check the name, "
            f"or set HF_TOKEN to a token that may read it"
        )
    if status == 403:
        return CommandError(
            f"{repository}: {endpoint} forbids it (403): set HF_TOKEN to a token that may read it"
        )
    if status == 429:
        return CommandError(f"{endpoint}: too many requests (429): wait some minutes, or set HF_TOKEN")
    return CommandError(f"{endpoint}: answered {status} for {repository}: try again later")


def _unreachable(error: BaseException) -> str:
    cause = error.__cause__ if isinstance(error, RevisionResolutionError) and error.__cause__ else error
    if isinstance(cause, HfHubHTTPError):
        return f"{_endpoint()}: answered {cause.response.status_code}: try again later"
    reason = str(cause).strip() or type(cause).__name__
    return f"{_endpoint()}: cannot be reached ({reason}): check the network, HF_ENDPOINT and proxies"


def _endpoint() -> str:
    return str(constants.ENDPOINT)
