"""A device that takes a fixed time per batch and no CPU, as a GPU looks to its host, and our service on it.

``python -m benchmarks.serving.simulated`` serves with the settings of the environment, but the model's
work is left to a `SimulatedDevice`.
"""

import argparse
import fcntl
import functools
import math
import os
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import torch
from fastapi import Depends, Request, Response
from torch import Tensor

from model.config import TokenizerConfig
from model.images.tensors import Images
from model.tokenizer import LatentKind, Tokenizer
from service.codecs.images import read_image
from service.codecs.tensors import write_raw
from service.photos.decode import ImageRules
from service.server import run
from service.settings import Settings

DEFAULT_BATCH_MS = 5.0
MAX_BATCH = 32
RAW_MEDIA_TYPE = "tensor/binary"


class SimulatedDevice:
    """Computes one batch at a time, whoever asks, in this process or, by a lock file, in any.

    Args:
        config: of the model, for the shapes of its results.
        batch_ms: time of a batch of any size up to `MAX_BATCH`, milliseconds.
        lock_file: shared by the processes that share the device; None where there is one process.
    """

    def __init__(self, config: TokenizerConfig, batch_ms: float, lock_file: Path | None = None) -> None:
        generator = torch.Generator().manual_seed(0)
        side = config.image_size
        self._latents = torch.randn((MAX_BATCH, *config.latent_shape), generator=generator)
        self._pictures = torch.rand((MAX_BATCH, 3, side, side), generator=generator)
        self._batch_s = batch_ms / 1e3
        self._turn = threading.Lock()
        self._lock_fd = None if lock_file is None else os.open(lock_file, os.O_RDWR | os.O_CREAT)

    def latents(self, num_items: int) -> Tensor:
        """Latents [B, C, h, w] after the time that they take; the same numbers every time."""
        return self._results(self._latents, num_items)

    def pictures(self, num_items: int) -> Tensor:
        """Pictures [B, 3, S, S] after the time that they take; the same numbers every time."""
        return self._results(self._pictures, num_items)

    def _results(self, stored: Tensor, num_items: int) -> Tensor:
        num_batches = math.ceil(num_items / MAX_BATCH)
        for _ in range(num_batches):
            with self._turn, self._turn_of_processes():
                time.sleep(self._batch_s)
        return stored[:num_items] if num_batches == 1 else torch.cat([stored] * num_batches)[:num_items]

    @contextmanager
    def _turn_of_processes(self) -> Iterator[None]:
        if self._lock_fd is None:
            yield
            return
        fcntl.flock(self._lock_fd, fcntl.LOCK_EX)
        try:
            yield
        finally:
            fcntl.flock(self._lock_fd, fcntl.LOCK_UN)


class ImageCode:
    """Work of every peer around the device: our own code for images, the same limits, the same bytes."""

    def __init__(self, config: TokenizerConfig) -> None:
        limits = Settings()
        self.rules = ImageRules(
            config.image_size, limits.max_image_pixels, limits.max_aspect_ratio, exact=False
        )

    def read(self, data: bytes) -> Tensor:
        """An image file to the device's input."""
        return read_image(data, self.rules)

    def write(self, latent: Tensor) -> Response:
        """One latent [C, h, w] to an answer."""
        return Response(write_raw(latent.to(torch.float16)), media_type=RAW_MEDIA_TYPE)


async def _body(request: Request) -> bytes:
    return await request.body()


Body = Annotated[bytes, Depends(_body)]


class SimulatedTokenizer(Tokenizer):
    """A tokenizer, loaded as any other, whose results come from a simulated device."""

    batch_ms = DEFAULT_BATCH_MS

    @functools.cached_property
    def simulated(self) -> SimulatedDevice:
        """The device that this tokenizer's work is done on."""
        return SimulatedDevice(self.config, self.batch_ms)

    def encode(self, images: Images, latent: LatentKind = "enriched", normalize: bool = False) -> Tensor:
        return self.simulated.latents(len(images))

    def decode(self, latents: Tensor, normalize: bool = False) -> Tensor:
        return self.simulated.pictures(len(latents))

    def reconstruct(self, images: Images, latent: LatentKind = "enriched") -> Tensor:
        return self.simulated.pictures(len(images))


def load_simulated(settings: Settings, batch_ms: float) -> Tokenizer:
    """The settings' checkpoint, on a simulated device."""
    tokenizer = SimulatedTokenizer.load(settings.checkpoint)
    tokenizer.batch_ms = batch_ms
    return tokenizer


def add_device_flag(parser: argparse.ArgumentParser) -> None:
    """``--device-ms``."""
    parser.add_argument(
        "--device-ms",
        type=float,
        default=DEFAULT_BATCH_MS,
        metavar="MS",
        help=f"time of a batch of up to {MAX_BATCH} on the simulated device (default: %(default)g)",
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Serve until told to stop; gives the service's exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.serving.simulated", description=__doc__)
    add_device_flag(parser)
    arguments = parser.parse_args(argv)

    def load(settings: Settings, *_: Any, **__: Any) -> Tokenizer:
        return load_simulated(settings, arguments.device_ms)

    return run(Settings(), load=load)


if __name__ == "__main__":
    sys.exit(main())
