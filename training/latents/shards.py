"""Files of latents: safetensors that say in their metadata what they hold.

Tensors of ``latents-000000.safetensors``, for n images that could be read:

- ``latents`` [n, C, h, w]; ``latents_flip`` likewise, of the mirror images, where asked for;
- ``labels`` [n] int64, -1 for none;
- ``moments.count`` [1], ``moments.mean`` and ``moments.second`` [C, h, w] float64: of all rows, mirror images
  included, from which the folder's statistics are merged.

The metadata has one entry, ``drorae``: a `ShardInfo` as JSON. (safetensors writes several entries in a
random order, so that equal files would differ.)

``statistics.safetensors`` holds ``mean`` and ``var`` per position [C, h, w], ``channel_mean`` and
``channel_var`` [C], and ``count`` [1]. A folder with mirror images also has ``latents_stats.pt``, where
LightningDiT's loader looks for mean and standard deviation per channel. That loader takes every
``*.safetensors`` file of a folder for latents and asks how many ``labels`` it has, so the statistics have
none, [0].
"""

import hashlib
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, Literal, TypeVar

import torch
from pydantic import Field, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from model.config import FrozenConfig
from training.errors import LatentsError
from training.evaluation.moments import PointwiseMoments
from training.latents.manifest import STATISTICS_FILE, BaseIdentity, Identity, Kind, ShardRecord
from training.latents.store import Store
from training.latents.units import Unit

METADATA_KEY = "drorae"
LIGHTNING_DIT_FILE = "latents_stats.pt"
_LENGTH_BYTES = 8
_MAX_HEADER_BYTES = 100 * 2**20  # safetensors' own limit
_DTYPES = {
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
    "I64": torch.int64,
    "U8": torch.uint8,
}


class BrokenImage(FrozenConfig):
    """An image that could not be read."""

    position: int = Field(ge=0, description="Within the input.")
    key: str
    reason: str


class ShardInfoOf(FrozenConfig, Generic[Kind]):
    """Metadata of a file, by the kind of identity."""

    format: Literal["drorae-latents"] = "drorae-latents"
    version: Literal[1] = 1
    identity: Kind
    input: str = Field(description="Name of the folder, tar or list that the images come from.")
    start: int = Field(ge=0, description="Position of the unit's first image within the input.")
    keys: tuple[str, ...] = Field(description="Names of the rows' images.")
    broken: tuple[BrokenImage, ...] = ()

    def is_of(self, unit: Unit, identity: BaseIdentity) -> bool:
        """Whether this is the file that the unit gives."""
        all_keys = list(self.keys)
        for image in self.broken:  # ascending, so each finds its place among those before it
            all_keys.insert(image.position - self.start, image.key)
        found = self.identity, self.input, self.start, all_keys
        return found == (identity, unit.input, unit.start, unit.keys)


class ShardInfo(ShardInfoOf[Identity]):
    """Metadata of a file of latents."""


AnyInfo = TypeVar("AnyInfo", bound=ShardInfoOf[Any])


def write_shard(
    store: Store, name: str, info: ShardInfoOf[Any], tensors: Mapping[str, Tensor]
) -> ShardRecord:
    """Write a file of latents, whole or not at all, and a receipt; equal contents give equal bytes.

    Raises:
        OSError: as `Store.write`.
    """
    whole = {key: tensor.contiguous() for key, tensor in tensors.items()}
    data = save(whole, metadata={METADATA_KEY: info.model_dump_json()})
    store.remove(receipt_name(name))  # of an earlier file
    store.write(name, data)
    record = _record(name, info, data)
    store.write(receipt_name(name), record.model_dump_json().encode())
    return record


def receipt_name(name: str) -> str:
    """Name of the file's receipt: its record, until the manifest of the finished job has them all."""
    return f".{name}.receipt"


def read_receipt(store: Store, name: str) -> ShardRecord | None:
    """The receipt of a file; None where there is none, or a damaged one."""
    data = store.read(receipt_name(name))
    try:
        return None if data is None else ShardRecord.model_validate_json(data)
    except ValidationError:
        return None


def read_record(store: Store, name: str, kind: type[ShardInfoOf[Any]] = ShardInfo) -> ShardRecord:
    """The record of a file that is there; reads all of it.

    Raises:
        LatentsError: it is missing, cut off or something else.
    """
    return _record(name, read_info(store, name, kind), store.read(name) or b"")


def read_tensors(store: Store, name: str, keys: Sequence[str]) -> dict[str, Tensor]:
    """Some tensors of a file; reads no others.

    Raises:
        LatentsError: the file is missing, cut off or something else, or lacks one of them.
    """
    _, places = _read_header(store, name)
    found = {}
    for key in keys:
        if key not in places:
            raise LatentsError(f"{store.path(name)}: has no tensor {key!r}")
        place = places[key]
        data = bytearray(store.read(name, place.start, place.stop) or b"")
        found[key] = torch.frombuffer(data, dtype=place.dtype).reshape(place.shape) if data else place.empty()
    return found


@dataclass(frozen=True)
class Place:
    """A tensor in a file: its bytes are those from ``start`` to ``stop``."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    stop: int

    def empty(self) -> Tensor:
        """A tensor of this kind."""
        return torch.empty(self.shape, dtype=self.dtype)


@dataclass(frozen=True)
class Header:
    """What a file of latents says of itself, and where its tensors are."""

    info: ShardInfo
    places: dict[str, Place]


def read_header(store: Store, name: str) -> Header:
    """The header of a file of latents, and whether it has the length that it states; reads nothing else.

    Raises:
        LatentsError: it is missing, cut off or something else.
    """
    metadata, places = _read_header(store, name)
    return Header(_parse_info(store, name, metadata, ShardInfo), places)


def read_info(store: Store, name: str, kind: type[AnyInfo]) -> AnyInfo:
    """What a file of any kind says of itself.

    Raises:
        LatentsError: as `read_header`.
    """
    return _parse_info(store, name, _read_header(store, name)[0], kind)


def _parse_info(store: Store, name: str, metadata: str, kind: type[AnyInfo]) -> AnyInfo:
    try:
        return kind.model_validate_json(metadata)
    except ValidationError as exc:
        raise LatentsError(f"{store.path(name)}: no file of latents: {exc.errors()[0]['msg']}") from exc


def _read_header(store: Store, name: str) -> tuple[str, dict[str, Place]]:
    """Our entry of a file's metadata, and where its tensors are."""
    size = store.size(name)
    if size is None:
        raise LatentsError(f"{store.path(name)}: there is no such file")
    try:
        num_bytes = int.from_bytes(store.read(name, 0, _LENGTH_BYTES) or b"", "little")
        base = _LENGTH_BYTES + num_bytes
        if num_bytes > min(size, _MAX_HEADER_BYTES):
            raise ValueError("its header is longer than the file")
        fields = json.loads(store.read(name, _LENGTH_BYTES, base) or b"")
        metadata = str(fields.pop("__metadata__")[METADATA_KEY])
        places = {key: _place(entry, base) for key, entry in fields.items()}
    except (ValueError, LookupError, TypeError, AttributeError) as exc:
        raise LatentsError(f"{store.path(name)}: no file of latents, or a damaged one ({exc})") from exc
    end = max((place.stop for place in places.values()), default=base)
    if end != size:
        raise LatentsError(f"{store.path(name)}: has {size} bytes, and its header says {end}")
    return metadata, places


def _place(entry: dict[str, Any], base: int) -> Place:
    low, high = entry["data_offsets"]
    return Place(
        _DTYPES[str(entry["dtype"])], tuple(map(int, entry["shape"])), base + int(low), base + int(high)
    )


def _record(name: str, info: ShardInfoOf[Any], data: bytes) -> ShardRecord:
    return ShardRecord(
        name=name,
        n=len(info.keys),
        bytes=len(data),
        sha256=hashlib.sha256(data).hexdigest(),
        broken=len(info.broken),
    )


def write_statistics(store: Store, moments: PointwiseMoments, has_flips: bool) -> None:
    """Write the files of statistics.

    Raises:
        OSError: as `Store.write`.
    """
    mean, var = moments.mean, moments.variance
    channel_mean = mean.mean(dim=(1, 2))
    channel_var = (var + (mean - channel_mean[:, None, None]).square()).mean(dim=(1, 2))
    tensors = {
        "mean": mean.float(),
        "var": var.float(),
        "channel_mean": channel_mean.float(),
        "channel_var": channel_var.float(),
        "count": torch.tensor([moments.count]),
        "labels": torch.empty(0, dtype=torch.int64),
    }
    store.write(STATISTICS_FILE, save(tensors))
    if has_flips:
        store.write(LIGHTNING_DIT_FILE, _for_lightning_dit(channel_mean.float(), channel_var.float()))


def read_statistics(store: Store) -> tuple[Tensor, Tensor]:
    """Mean and variance per position, each [C, h, w] float32.

    Raises:
        LatentsError: the file is missing or damaged.
    """
    try:
        tensors = load(store.read(STATISTICS_FILE) or b"")
        return tensors["mean"], tensors["var"]
    except (SafetensorError, KeyError) as exc:
        raise LatentsError(
            f"{store.path(STATISTICS_FILE)}: missing or damaged: give the command that made it once more"
        ) from exc


def _for_lightning_dit(channel_mean: Tensor, channel_var: Tensor) -> bytes:
    buffer = io.BytesIO()
    values = {"mean": channel_mean, "std": channel_var.sqrt()}
    torch.save({name: value[None, :, None, None] for name, value in values.items()}, buffer)
    return buffer.getvalue()
