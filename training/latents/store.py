"""The folder that latents go to: files that are there whole or not at all, whoever writes them.

`FolderStore` is a folder of a file system, on which several machines may write. Other places, such as object
storage, have the same methods.
"""

import os
import shutil
import socket
import time
from pathlib import Path
from typing import Protocol

MARK = ".tmp-"
STALE_AFTER_S = 3600.0


class Store(Protocol):
    """Files of one flat folder, by name."""

    def path(self, name: str) -> str:
        """A file's place, for messages."""

    def names(self) -> set[str]:
        """Names of all files, those in the making left out."""

    def size(self, name: str) -> int | None:
        """Bytes of a file; None where there is none."""

    def read(self, name: str, start: int = 0, stop: int | None = None) -> bytes | None:
        """Contents of a file, or the bytes from ``start`` to ``stop``; None where there is none."""

    def write(self, name: str, data: bytes) -> None:
        """Put a file in place, whole or not at all, whatever was there before.

        Raises:
            OSError: no room, or not writable; names the file.
        """

    def remove(self, name: str) -> None:
        """Delete a file that may be there."""

    def free_bytes(self) -> int | None:
        """Room that is left; None where nothing tells."""

    def remove_remains(self) -> None:
        """Delete what killed processes left in the making."""


class FolderStore:
    """A folder. Made on the first write."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def path(self, name: str) -> str:
        return str(self.folder / name)

    def names(self) -> set[str]:
        if not self.folder.is_dir():
            return set()
        return {name for name in os.listdir(self.folder) if MARK not in name}

    def size(self, name: str) -> int | None:
        try:
            return (self.folder / name).stat().st_size
        except FileNotFoundError:
            return None

    def read(self, name: str, start: int = 0, stop: int | None = None) -> bytes | None:
        try:
            with (self.folder / name).open("rb") as stream:
                stream.seek(start)
                return stream.read(-1 if stop is None else stop - start)
        except FileNotFoundError:
            return None

    def write(self, name: str, data: bytes) -> None:
        """Under a name of this process; sync, then rename."""
        self.folder.mkdir(parents=True, exist_ok=True)
        file = self.folder / name
        partial = self.folder / f".{name}{MARK}{socket.gethostname()}-{os.getpid()}"
        try:
            with partial.open("wb") as stream:
                stream.write(data)
                stream.flush()
                os.fsync(stream.fileno())
            os.replace(partial, file)
            _sync_folder(self.folder)
        except BaseException as exc:
            partial.unlink(missing_ok=True)
            if isinstance(exc, OSError) and exc.filename is None:  # write and fsync name no file
                exc.filename = str(file)
            raise

    def remove(self, name: str) -> None:
        (self.folder / name).unlink(missing_ok=True)

    def free_bytes(self) -> int | None:
        parent = next(folder for folder in (self.folder, *self.folder.absolute().parents) if folder.exists())
        return shutil.disk_usage(parent).free

    def remove_remains(self) -> None:
        """Delete what killed processes left in the making: of this machine, or older than an hour."""
        for file in self.folder.glob(f".*{MARK}*"):
            host, _, process = file.name.rpartition(MARK)[2].rpartition("-")
            is_dead = host == socket.gethostname() and not _is_running(process)
            try:
                if is_dead or time.time() - file.stat().st_mtime > STALE_AFTER_S:
                    file.unlink()
            except FileNotFoundError:
                continue


def _is_running(process: str) -> bool:
    """Whether a process of this id runs; one that ended counts as gone though nobody waited for it."""
    try:
        stat = Path(f"/proc/{process}/stat").read_text(encoding="utf-8", errors="replace")
    except (FileNotFoundError, ProcessLookupError):
        return False
    return stat.rpartition(")")[2].split()[0] not in "XZ"


def _sync_folder(folder: Path) -> None:
    """Make a rename outlive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
