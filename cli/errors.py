"""Errors that end a command early, and every package's errors as an exit status and one sentence.

::

    CommandError    1   the operation failed
    └── UsageError  2   a wrong argument, or input that cannot be used
"""

import os

import torch

from model.errors import ModelError

EXIT_OK = 0
EXIT_FAILED = 1
EXIT_USAGE = 2
EXIT_SOME_BROKEN = 3
"""Done, but for photos that could not be read."""
EXIT_INTERRUPTED = 130


class CommandError(Exception):
    """The operation failed; the message is one sentence for the user."""

    exit_status = EXIT_FAILED


class UsageError(CommandError):
    """A wrong argument, or input that cannot be used."""

    exit_status = EXIT_USAGE


def describe(error: BaseException) -> tuple[int, str] | None:
    """Exit status and sentence of an error that users can cause, or None for a defect of ours."""
    if isinstance(error, KeyboardInterrupt):
        return EXIT_INTERRUPTED, "interrupted"
    if isinstance(error, CommandError):
        return error.exit_status, str(error)
    if isinstance(error, ModelError):
        return EXIT_USAGE, str(error)
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return EXIT_FAILED, "out of memory: try a smaller --batch-size"
    if isinstance(error, OSError):
        return EXIT_FAILED, os_error_sentence(error)
    return _describe_lazily_imported(error)


def os_error_sentence(error: OSError) -> str:
    """The file and the system's reason."""
    reason = error.strerror or str(error) or type(error).__name__
    return f"{os.fsdecode(error.filename)}: {reason}" if isinstance(error.filename, str | bytes) else reason


def _describe_lazily_imported(error: BaseException) -> tuple[int, str] | None:
    """Errors of packages that not every command loads; one that was raised has its package loaded."""
    root = type(error).__module__.split(".")[0]
    if root == "service":
        from service.errors import ServiceError

        if isinstance(error, ServiceError):
            return (EXIT_USAGE if error.status < 500 or error.status == 503 else EXIT_FAILED), error.detail
    if root == "training":
        from training.errors import ClusterError, DivergenceError, RankError, TrainingError, WorkerError

        if isinstance(error, TrainingError):
            has_failed = isinstance(error, ClusterError | DivergenceError | RankError | WorkerError)
            return (EXIT_FAILED if has_failed else EXIT_USAGE), str(error)
    return None
