"""Processes that decode images: what stops a run does not stop them, and they end with it.

``timeout``, systemd and SLURM send SIGTERM to a whole process group, and a terminal SIGINT. The step under
way still needs its images then, and the trainer lets its workers go when it is done.
"""

import atexit
import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import resource_tracker
from multiprocessing.process import BaseProcess
from typing import Any

from torch.utils.data import DataLoader

STOP_SIGNALS = frozenset({signal.SIGINT, signal.SIGTERM})


def iterate(loader: "DataLoader[Any]") -> "Iterator[Any]":
    """The loader's batches. Its workers ignore SIGINT and SIGTERM from their first instruction on.

    Args:
        loader: made with ``worker_init_fn=ignore_signals``.
    """
    if not loader.num_workers:
        return iter(loader)
    before = set(multiprocessing.active_children())
    with _signals_held_back(), _child_handler_kept():
        batches = iter(loader)
    # An exit would ask them to terminate and then wait for ever; this runs before PyTorch's own waiting.
    atexit.register(_kill, set(multiprocessing.active_children()) - before)
    return batches


def _kill(workers: set[BaseProcess]) -> None:
    for worker in workers:
        worker.kill()


def ignore_signals(worker: int) -> None:
    """``worker_init_fn`` of every loader.

    The worker also watches its parent: PyTorch looks at the parent's id, which is forkserver's own there.
    """
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)  # which also drops what arrived meanwhile
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)
    end_with_parent()


def end_with_parent() -> None:
    """End this process when the one that started it is gone, killed perhaps."""

    def watch() -> None:
        parent = multiprocessing.parent_process()
        assert parent is not None
        parent.join()
        os._exit(1)  # nothing to clean up: files are written whole or not at all

    threading.Thread(target=watch, daemon=True).start()


@contextmanager
def _signals_held_back() -> Iterator[None]:
    """A process inherits which signals wait, and keeps them waiting until it ignores them."""
    if multiprocessing.get_start_method() != "fork":
        resource_tracker.ensure_running()  # its own start would let the signals through again
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextmanager
def _child_handler_kept() -> Iterator[None]:
    """PyTorch's SIGCHLD handler reports a killed worker anywhere, in the middle of a step too.

    Without it the next batch does.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.getsignal(signal.SIGCHLD)
    try:
        yield
    finally:
        signal.signal(signal.SIGCHLD, before)
