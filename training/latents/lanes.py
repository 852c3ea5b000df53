"""A lane: one process that encodes units, on one GPU or one core.

It asks for units and reports through a pipe. On a GPU, decoder processes work ahead of it across the borders
of units, several batches are in flight, and a thread writes finished files. On a core the lane decodes its
batches itself: a lane per core computes more than one lane with a thread per core does (47 images per second
to 40, with ``mini`` on two cores).
"""

import logging
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from kernels.dispatch import FusionSetting
from model.process import keep_freed_memory
from model.tokenizer import Tokenizer
from training.data.workers import ignore_signals, iterate
from training.latents.encoding import DecodedBatch, Encode, UnitLatents, decode_batch, latent_encoder
from training.latents.manifest import Identity, ShardRecord
from training.latents.store import Store
from training.latents.units import Unit, batch_starts, read_images

PREFETCHED_BATCHES = 3
"""Per decoder process."""


@dataclass(frozen=True)
class LaneConfig:
    """Settings of a lane.

    Attributes:
        checkpoint: directory or bundled name.
        device: one device of PyTorch.
        fusion: implementation of the fusion.
        identity: what latents depend on.
        store: where the files go.
        num_decoders: processes that decode images; 0 for none but the lane.
    """

    checkpoint: str
    device: str
    fusion: FusionSetting
    identity: Identity
    store: Store
    num_decoders: int


@dataclass(frozen=True)
class Ready:
    """The lane has loaded its model. A batch takes ``batch_s`` seconds, without its images' decoding."""

    batch_s: float


@dataclass(frozen=True)
class Ask:
    """The lane wants a unit; the answer is a `Unit`, or None: there are no more."""


@dataclass(frozen=True)
class Encoded:
    """A batch is done."""

    unit: int
    num_images: int
    num_broken: int


@dataclass(frozen=True)
class Done:
    """A unit's file is in place."""

    unit: int
    record: ShardRecord


@dataclass(frozen=True)
class Failed:
    """The lane ends with this error."""

    error: Exception


Message = Ready | Ask | Encoded | Done | Failed


def run_lane(config: LaneConfig, connection: Connection) -> None:
    """Encode units until there are no more; the body of the process."""
    ignore_signals(0)  # the command ends its lanes, and a lane ends with its command
    pipe = Pipe(connection)
    try:
        device = torch.device(config.device)
        if device.type == "cpu":
            torch.set_num_threads(1)
            keep_freed_memory()
        encode = load_encoder(config)
        pipe.send(Ready(measure_batch(encode, config.identity, device)))
        encode_all(config, encode, pipe.ask, pipe.send)
    except Exception as exc:  # the process's boundary: the command tells users
        logging.getLogger(__name__).debug("a lane failed", exc_info=True)
        pipe.send(Failed(exc))


def load_encoder(config: LaneConfig) -> Encode:
    """The tokenizer's encoder, on its device.

    Raises:
        ModelError: the checkpoint cannot be loaded, or the fusion cannot run here.
    """
    dtype = getattr(torch, config.identity.precision)
    tokenizer = Tokenizer.load(config.checkpoint, config.device, dtype, config.fusion)
    tokenizer.decoder.blocks = torch.nn.ModuleList()  # which encodes nothing, and may have 1.6 GB
    return latent_encoder(tokenizer, config.identity)


def measure_batch(encode: Encode, identity: Identity, device: torch.device) -> float:
    """Seconds that a batch takes; the first one warms the device up."""
    side = identity.image_size
    pixels = torch.zeros(identity.batch_size, 3, side, side, dtype=torch.uint8, device=device)
    for _ in range(2):
        start = time.perf_counter()
        with torch.no_grad():
            encode(pixels).cpu()
    return time.perf_counter() - start


def encode_all(
    config: LaneConfig, encode: Encode, ask: Callable[[], Unit | None], send: Callable[[Message], None]
) -> None:
    """Encode unit after unit.

    Args:
        config: of the lane.
        encode: the tokenizer's encoder.
        ask: gives the next unit; None: there are no more.
        send: takes reports, also those of the thread that writes files.

    Raises:
        LatentsError: a value does not fit the dtype.
        OSError: a file cannot be written.
    """
    device = torch.device(config.device)
    writing: Future[None] | None = None
    work: UnitLatents | None = None
    with ThreadPoolExecutor(1, "writer") as writer:
        for batch in decoded_batches(config, ask):
            work = work or UnitLatents(batch.unit, config.identity, device)
            work.add(batch, encode)
            send(Encoded(batch.unit.number, batch.num_images, len(batch.broken)))
            if batch.is_last:
                work.seal()
                if writing is not None:
                    writing.result()  # its errors are raised here; no more than one file waits
                writing = writer.submit(_write, work, config.store, send)
                work = None
        if writing is not None:
            writing.result()


def decoded_batches(config: LaneConfig, ask: Callable[[], Unit | None]) -> Iterator[DecodedBatch]:
    """The batches of unit after unit, decoded ahead by the lane's decoder processes, if it has some.

    Args:
        config: of the lane.
        ask: gives the next unit; None: there are no more.
    """
    tasks = _Tasks(config, ask)
    for number, start, pixels, broken in iterate(_loader(config, tasks)):
        batch = DecodedBatch(tasks.units[number], start, pixels, broken)
        if batch.is_last:
            del tasks.units[number]
        yield batch


def _write(work: UnitLatents, store: Store, send: Callable[[Message], None]) -> None:
    send(Done(work.unit.number, work.write(store)))


class Pipe:
    """The lane's end of the pipe; the thread that writes files reports as well."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._sending = threading.Lock()

    def send(self, message: Message) -> None:
        with self._sending:
            self._connection.send(message)

    def ask(self) -> Unit | None:
        """The next unit; only one thread asks."""
        self.send(Ask())
        return self._connection.recv()


Task = tuple[Unit, int, list[bytes | str] | None]
"""A batch to decode: its images as a unit, its start in the whole unit, and its files if they were read."""


class _Tasks:
    """Batches to decode, in order, for as long as there are units."""

    def __init__(self, config: LaneConfig, ask: Callable[[], Unit | None]) -> None:
        self.size = config.identity.batch_size
        self.ask = ask
        self.units: dict[int, Unit] = {}

    def __iter__(self) -> Iterator[Task]:
        while (unit := self.ask()) is not None:
            self.units[unit.number] = unit
            # A compressed tar has no random access: it is read here, once, and not by every decoder.
            files = read_images(unit, 0, len(unit)) if unit.is_compressed else None
            for start in batch_starts(unit, self.size):
                images = unit.images[start : start + self.size]
                data = None if files is None else [next(files) for _ in images]
                yield replace(unit, images=images), start, data


class _Decoding(Dataset[tuple[int, int, Tensor, dict[int, str]]]):
    """Decodes tasks, in the loader's processes or in the lane's."""

    def __init__(self, identity: Identity) -> None:
        self.identity = identity

    def __getitem__(self, task: Task) -> tuple[int, int, Tensor, dict[int, str]]:
        part, start, files = task
        batch = decode_batch(part, 0, self.identity, files)
        return part.number, start, batch.pixels, {start + row: why for row, why in batch.broken.items()}


def _loader(config: LaneConfig, tasks: _Tasks) -> "DataLoader[tuple[int, int, Tensor, dict[int, str]]]":
    return DataLoader(
        _Decoding(config.identity),
        batch_size=None,
        sampler=tasks,
        num_workers=config.num_decoders,
        pin_memory=config.device.startswith("cuda"),
        prefetch_factor=PREFETCHED_BATCHES if config.num_decoders else None,
        worker_init_fn=ignore_signals,
    )
