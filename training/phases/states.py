"""A run's saved states: the last two, since a crash of the machine may damage the newest."""

import io
import logging
import pickle
import zipfile
from pathlib import Path
from typing import Any

import torch

from training.errors import TrainingError
from training.output.files import write_atomically

logger = logging.getLogger(__name__)

STATE_FILE = "state.pt"
PREVIOUS_STATE_FILE = "state-previous.pt"
DAMAGED_STATE_FILE = "state-damaged.pt"
RUN_FILE = "run.json"  # written last
# What zipfile raises for bytes that are no archive, or a damaged one.
_DAMAGE = (zipfile.BadZipFile, EOFError, ValueError, RuntimeError, LookupError, OverflowError)


def check_run_directory(folder: Path, resume: bool) -> None:
    """Whether a run may begin, or go on, in a folder; looked at before anything is loaded.

    Raises:
        TrainingError: a file stands there, or a run that is not to be continued or cannot be.
    """
    if folder.exists() and not folder.is_dir():
        raise TrainingError(f"{folder} is a file: choose another --output")
    if holds_state(folder):
        if not resume:
            raise TrainingError(
                f"{folder} holds a run: continue it with --resume, or choose another --output"
            )
    elif (folder / RUN_FILE).exists():
        raise TrainingError(
            f"{folder} holds a finished run, whose {STATE_FILE} is gone: choose another --output"
        )


def holds_state(folder: Path) -> bool:
    """Whether a run has saved something in a folder."""
    return any((folder / name).exists() for name in (STATE_FILE, PREVIOUS_STATE_FILE))


def save_state(folder: Path, state: dict[str, Any]) -> None:
    """Write a state; the one before stays beside it.

    Raises:
        OSError: the disk is full or the place not writable; both states are as they were.
    """
    buffer = io.BytesIO()
    torch.save(state, buffer)
    write_atomically(folder / STATE_FILE, buffer.getvalue(), previous=folder / PREVIOUS_STATE_FILE)


def newest_whole_state(folder: Path) -> Path:
    """The file to resume from: the newest, or the one before where that is damaged or gone.

    A damaged one is moved out of the way, so that it does not take the place of the one before.

    Raises:
        TrainingError: neither is whole; names both.
    """
    newest, previous = folder / STATE_FILE, folder / PREVIOUS_STATE_FILE
    if _is_whole(newest):
        return newest
    if not _is_whole(previous):
        raise TrainingError(f"{newest}: damaged, and {previous.name} is no whole state either")
    if newest.exists():
        newest.replace(folder / DAMAGED_STATE_FILE)
        logger.warning("%s is damaged, now %s: going on from the state before it", newest, DAMAGED_STATE_FILE)
    else:
        logger.warning("%s is gone: going on from the state before it", newest)
    return previous


def read_state(file: Path) -> dict[str, Any]:
    """A saved state, its tensors on the CPU.

    Raises:
        TrainingError: it is none.
    """
    try:
        state = torch.load(file, map_location="cpu", weights_only=True)
    except (RuntimeError, ValueError, EOFError, LookupError, pickle.UnpicklingError) as exc:
        raise TrainingError(f"{file}: not a state of a run: {exc}") from exc
    if not isinstance(state, dict):
        raise TrainingError(f"{file}: not a state of a run: holds {type(state).__name__}")
    return state


def _is_whole(file: Path) -> bool:
    """Whether every record has the checksum that it was written with, which torch.load does not ask."""
    try:
        with zipfile.ZipFile(file) as archive:
            return archive.testzip() is None
    except FileNotFoundError:
        return False
    except _DAMAGE:
        return False
