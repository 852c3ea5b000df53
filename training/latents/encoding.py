"""From a unit's images to its file of latents.

`encode_unit` is all that an engine needs: it takes a unit and its decoded batches, and writes the unit's one
file. Engines differ in who decodes the batches, and on which device they run.

Shape legend: B batch, F 2 with mirror images or 1, n images of a unit, C h w one latent, S image side.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from model.images.files import fit_picture
from model.images.tensors import to_byte_tensor
from model.tokenizer import Tokenizer
from training.data.batches import decode_image
from training.errors import DataError, LatentsError
from training.evaluation.moments import PointwiseMoments
from training.latents.manifest import Identity, ShardRecord
from training.latents.shards import BrokenImage, ShardInfo, write_shard
from training.latents.store import Store
from training.latents.units import Unit, batch_starts, read_images

MAX_IN_FLIGHT = 3
"""Batches that a GPU has at once: one that it works on, one that is copied to it, and one that comes."""

Encode = Callable[[Tensor], Tensor]
"""Images [B, 3, S, S] uint8 to latents [B, F, C, h, w] in the stored dtype, both on the device."""


@dataclass(frozen=True)
class DecodedBatch:
    """Consecutive images of a unit, as pixels.

    Attributes:
        unit: whose images they are.
        start: position of the first one within the unit.
        pixels: [B, 3, S, S] uint8, always of the full batch size; rows that have no image are black.
        broken: why an image could not be read, by its position within the unit.
    """

    unit: Unit
    start: int
    pixels: Tensor
    broken: Mapping[int, str]

    @property
    def num_images(self) -> int:
        """Rows that stand for images, broken ones included."""
        return min(len(self.pixels), len(self.unit) - self.start)

    @property
    def is_last(self) -> bool:
        """Whether the unit ends with it."""
        return self.start + self.num_images == len(self.unit)


def decode_batch(
    unit: Unit, start: int, identity: Identity, files: Sequence[bytes | str] | None = None
) -> DecodedBatch:
    """Decode one batch of a unit.

    Args:
        unit: the unit.
        start: of the batch within the unit.
        identity: batch size, image size and fit.
        files: the images' files, or why one cannot be read; read from the unit's paths by default.
    """
    side, size = identity.image_size, identity.batch_size
    pixels = torch.zeros(size, 3, side, side, dtype=torch.uint8)
    broken: dict[int, str] = {}
    if files is None:
        files = list(read_images(unit, start, start + size))
    for row, data in enumerate(files):
        try:
            if isinstance(data, str):
                raise DataError(data)
            pixels[row] = to_byte_tensor(fit_picture(decode_image(data), side, identity.fit))
        except DataError as exc:
            broken[start + row] = str(exc)
    return DecodedBatch(unit, start, pixels, broken)


def decode_unit(unit: Unit, identity: Identity) -> Iterator[DecodedBatch]:
    """Decode a unit's batches, one after the other, in this process."""
    files = read_images(unit, 0, len(unit))
    for start in batch_starts(unit, identity.batch_size):
        count = min(identity.batch_size, len(unit) - start)
        yield decode_batch(unit, start, identity, [next(files) for _ in range(count)])


def latent_encoder(tokenizer: Tokenizer, identity: Identity) -> Encode:
    """What a tokenizer makes of images, as the identity says."""
    return partial(_encode, tokenizer, identity)


def _encode(tokenizer: Tokenizer, identity: Identity, pixels: Tensor) -> Tensor:
    views = [pixels, pixels.flip(-1)] if identity.flip else [pixels]
    latents = [tokenizer.latents(view, identity.latent, identity.normalized) for view in views]
    return torch.stack(latents, dim=1).to(identity.torch_dtype)


def encode_unit(
    unit: Unit,
    batches: Iterable[DecodedBatch],
    encode: Encode,
    identity: Identity,
    device: torch.device,
    store: Store,
) -> ShardRecord:
    """Encode a unit's batches and write its file.

    Raises:
        LatentsError: a value does not fit the dtype; names the image.
        OSError: the file cannot be written; names it.
    """
    work = UnitLatents(unit, identity, device)
    for batch in batches:
        work.add(batch, encode)
    return work.write(store)


class UnitLatents:
    """The latents of a unit in the making; on a GPU, `add` returns before the device is done.

    Args:
        unit: the unit.
        identity: what its latents depend on.
        device: where they are encoded.
    """

    def __init__(self, unit: Unit, identity: Identity, device: torch.device) -> None:
        self.unit = unit
        self.identity = identity
        self.device = device
        self.broken: dict[int, str] = {}
        shape = (len(unit), 1 + identity.flip, *identity.shape)
        # Pinned memory alone is copied to without waiting.
        self.latents = torch.empty(shape, dtype=identity.torch_dtype, pin_memory=device.type == "cuda")
        self.moments = PointwiseMoments(identity.shape, device)
        self.in_flight: deque[torch.cuda.Event] = deque()

    @torch.no_grad()
    def add(self, batch: DecodedBatch, encode: Encode) -> None:
        """Encode the unit's next batch; waits where a GPU has enough of them."""
        if len(self.in_flight) >= MAX_IN_FLIGHT:
            self.in_flight.popleft().synchronize()
        self.broken |= batch.broken
        stop = batch.start + batch.num_images
        kept = [row for row in range(batch.num_images) if batch.start + row not in batch.broken]
        if not kept:
            return
        encoded = encode(batch.pixels.to(self.device, non_blocking=True))
        self.latents[batch.start : stop].copy_(encoded[: batch.num_images], non_blocking=True)
        is_whole = len(kept) == len(encoded)
        self.moments.update((encoded if is_whole else encoded[kept]).flatten(0, 1))
        if self.device.type == "cuda":
            self._mark()

    def seal(self) -> None:
        """After the last batch: start to bring the moments to the host as well."""
        if self.device.type == "cuda" and self.moments.mean.is_cuda:
            self.moments.mean = self.moments.mean.to("cpu", non_blocking=True)
            self.moments.second = self.moments.second.to("cpu", non_blocking=True)
            self._mark()

    def write(self, store: Store) -> ShardRecord:
        """Wait for the device and write the unit's file.

        Raises:
            LatentsError: a value does not fit the dtype; names the image.
            OSError: the file cannot be written; names it.
        """
        self.seal()
        for event in self.in_flight:
            event.synchronize()
        kept = [position for position in range(len(self.unit)) if position not in self.broken]
        latents = self.latents[kept] if self.broken else self.latents
        self._check_finite(latents, kept)
        tensors = {"latents": latents[:, 0], **self.moments.tensors("moments")}
        if self.identity.flip:
            tensors["latents_flip"] = latents[:, 1]
        tensors["labels"] = torch.tensor([self.unit.images[p].label for p in kept], dtype=torch.int64)
        return write_shard(store, self.unit.file_name, self._info(kept), tensors)

    def _mark(self) -> None:
        event = torch.cuda.Event()
        event.record()
        self.in_flight.append(event)

    def _info(self, kept: Sequence[int]) -> ShardInfo:
        images, start = self.unit.images, self.unit.start
        broken = [
            BrokenImage(position=start + position, key=images[position].key, reason=reason)
            for position, reason in sorted(self.broken.items())
        ]
        return ShardInfo(
            identity=self.identity,
            input=self.unit.input,
            start=start,
            keys=[images[position].key for position in kept],
            broken=tuple(broken),
        )

    def _check_finite(self, latents: Tensor, kept: Sequence[int]) -> None:
        if bool(torch.isfinite(self.moments.mean).all()):
            return
        finite = torch.isfinite(latents.flatten(1)).all(dim=1)
        first = int((~finite).nonzero()[0])
        raise LatentsError(
            f"{self.unit.images[kept[first]].key} in {self.unit.input}: a latent is too large for "
            f"{self.identity.dtype}, or not a number: use --dtype bfloat16 or float32"
        )
