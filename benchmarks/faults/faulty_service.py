"""The service with a fault in its model: ``python -m benchmarks.faults.faulty_service FAULT``.

Most wait for an image of one exact colour, so that neither warming the model nor an ordinary photo
sets them off:

  gate    the model waits as long as a file exists, whatever the batch
  hang    a batch that holds the image never returns
  memory  a batch that holds the image is out of memory, and so is, once a file exists, any of more
          than ``--largest`` items
  poison  a batch that holds the image raises an error
  die     a batch that holds the image ends the thread that runs the model

Settings come from the environment, as for the service itself.
"""

import argparse
import logging
import sys
import threading
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.probes.inputs import MARK_RGB
from model.images.tensors import to_unit
from model.tokenizer import Tokenizer
from service.engine.devices import load_tokenizer
from service.server import run
from service.settings import Settings

logger = logging.getLogger(__name__)

_GATE_POLL_S = 0.01
_MARK_TOLERANCE = 0.02  # in units of [0, 1]: five of 255 levels

Fault = Callable[[Tensor], None]
"""Called with each batch [B, ...] before the model; returns, raises, or never returns."""


class FaultyTokenizer:
    """A tokenizer whose every batch passes a fault first; all else is the tokenizer's own."""

    def __init__(self, tokenizer: Tokenizer, fault: Fault) -> None:
        self._tokenizer = tokenizer
        self._fault = fault

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tokenizer, name)

    def encode(self, images: Tensor, **options: Any) -> Tensor:
        self._fault(images)
        return self._tokenizer.encode(images, **options)

    def decode(self, latents: Tensor, **options: Any) -> Tensor:
        self._fault(latents)
        return self._tokenizer.decode(latents, **options)

    def reconstruct(self, images: Tensor, **options: Any) -> Tensor:
        self._fault(images)
        return self._tokenizer.reconstruct(images, **options)


def main(argv: Sequence[str] | None = None) -> int:
    """Serve; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.faults.faulty_service", description=__doc__)
    parser.add_argument("fault", choices=("gate", "hang", "memory", "poison", "die"))
    parser.add_argument("--file", type=Path, help="the gate is shut, or memory short, while it exists")
    parser.add_argument("--largest", type=int, default=2, help="items that memory holds")
    arguments = parser.parse_args(argv)
    if arguments.fault in ("gate", "memory") and arguments.file is None:
        parser.error(f"{arguments.fault} needs --file")
    faults: dict[str, Fault] = {
        "gate": partial(_gate, arguments.file),
        "hang": _hang,
        "memory": partial(_out_of_memory, arguments.file, arguments.largest),
        "poison": _poison,
        "die": _die,
    }
    fault = faults[arguments.fault]

    def load(*settings: Any, **options: Any) -> Any:
        return FaultyTokenizer(load_tokenizer(*settings, **options), fault)

    return run(Settings(), load=load)


def holds_mark(batch: Tensor) -> bool:
    """Whether one of the images [B, 3, S, S], bytes or in [0, 1], is all of the marked colour."""
    if batch.ndim != 4 or batch.shape[1] != 3:
        return False
    colour = torch.tensor(MARK_RGB, device=batch.device).view(1, 3, 1, 1) / 255
    unit = to_unit(batch)
    distance = (unit - colour).abs().flatten(1).amax(dim=1)
    return bool((distance < _MARK_TOLERANCE).any())


def _gate(file: Path, batch: Tensor) -> None:
    while file.exists():
        time.sleep(_GATE_POLL_S)


def _hang(batch: Tensor) -> None:
    if holds_mark(batch):
        logger.warning("the model hangs from here on")
        threading.Event().wait()


def _out_of_memory(file: Path, largest: int, batch: Tensor) -> None:
    if holds_mark(batch) or (len(batch) > largest and file.exists()):
        raise torch.OutOfMemoryError(f"injected: no memory for {len(batch)} items")


def _poison(batch: Tensor) -> None:
    if holds_mark(batch):
        raise RuntimeError("injected: an item that the model cannot take")


def _die(batch: Tensor) -> None:
    if holds_mark(batch):
        raise SystemExit("injected: the thread ends")


if __name__ == "__main__":
    sys.exit(main())
