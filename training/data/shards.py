"""Partial results of a pass over images: sums, one safetensors file per rank, which says what it covers.

A pass goes on after a kill: a shard that is there and of the same identity is done, and another identity is
refused by naming what differs. Latents themselves are kept as `training.latents` describes.
"""

import hashlib
import json
import logging
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from training.data.sources import Sample
from training.errors import DataError, TrainingError
from training.output.files import write_atomically

logger = logging.getLogger(__name__)

SHARD_PATTERN = "shard-*.safetensors"


@dataclass(frozen=True)
class Shard:
    """Finished work.

    Attributes:
        positions: of the images in the list, ascending; broken images are finished too.
        tensors: sums over these images.
        facts: anything else, as JSON.
    """

    positions: list[int]
    tensors: dict[str, Tensor]
    facts: dict[str, Any]


def write_shard(file: Path, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
    """Write a shard, whole or not at all.

    Raises:
        OSError: as `write_atomically`.
    """
    whole = {name: tensor.contiguous() for name, tensor in tensors.items()}
    write_atomically(file, save(whole, metadata={"shard": json.dumps(facts)}))


def open_shard(file: Path) -> tuple[Any, dict[str, Any]]:
    """A shard, mapped into memory, and its facts.

    Raises:
        DataError: it is missing, cut off or something else.
    """
    try:
        shard: Any = safe_open(file, framework="pt")
        return shard, dict(json.loads((shard.metadata() or {})["shard"]))
    except (SafetensorError, OSError, ValueError, KeyError, TypeError) as exc:
        raise DataError(f"{file}: missing, or not a whole shard ({exc}): delete it and start again") from exc


def differing(found: Mapping[str, Any], wanted: Mapping[str, Any]) -> list[str]:
    """Names of what an identity has otherwise than it should."""
    return [name for name, value in wanted.items() if found.get(name) != value]


def listing_sha256(samples: Sequence[Sample]) -> str:
    """Digest of names and sizes, not of places: a cache or an unfinished pass may move with its images.

    Raises:
        OSError: a listed file is gone.
    """
    digest = hashlib.sha256()
    for sample in samples:
        if sample.data is not None:
            num_bytes = len(sample.data)
        else:
            num_bytes = sample.file.stat().st_size if sample.num_bytes is None else sample.num_bytes
        digest.update(json.dumps([sample.key, num_bytes]).encode())
    return digest.hexdigest()


class ShardStore:
    """The directory of one pass, or none: then nothing outlives the process.

    Args:
        directory: made on the first write, gone after `remove`.
        identity: what the pass depends on, as JSON; shards of another identity are refused.
    """

    def __init__(self, directory: Path | None, identity: Mapping[str, Any]) -> None:
        self.directory = directory
        self.identity = json.loads(json.dumps(identity))

    def read(self) -> list[Shard]:
        """The shards of a pass that was cut off, in the order of their first positions.

        Raises:
            TrainingError: the directory holds another pass, or something unreadable; says what to do.
        """
        if self.directory is None:
            return []
        shards = [self._read(file) for file in sorted(self.directory.glob(SHARD_PATTERN))]
        return sorted((s for s in shards if s.positions), key=lambda shard: shard.positions[0])

    def write(self, shard: Shard) -> None:
        """Put a shard in its file, whole or not at all, replacing its earlier state."""
        if self.directory is None or not shard.positions:
            return
        facts = {
            "identity": self.identity,
            "positions": _to_intervals(shard.positions),
            "facts": shard.facts,
        }
        file = self.directory / f"shard-{shard.positions[0]:09d}.safetensors"
        write_shard(file, shard.tensors, facts)

    def remove(self) -> None:
        """Delete the directory: the pass is finished and its result is safe."""
        if self.directory is not None:
            shutil.rmtree(self.directory, ignore_errors=True)

    def _read(self, file: Path) -> Shard:
        stream, facts = open_shard(file)
        try:
            tensors = {name: stream.get_tensor(name) for name in stream.keys()}  # noqa: SIM118
            positions = [p for low, high in facts["positions"] for p in range(low, high)]
            found, shard = facts["identity"], Shard(positions, tensors, facts["facts"])
        except (SafetensorError, ValueError, KeyError, TypeError) as exc:
            raise DataError(f"{file}: not a shard of a run: delete it to compute its images again") from exc
        if changed := differing(found, self.identity):
            raise TrainingError(
                f"{self.directory} holds an unfinished run with other {', '.join(sorted(changed))}: "
                "finish that one, or delete the directory"
            )
        return shard


def _to_intervals(positions: Sequence[int]) -> list[list[int]]:
    """Ascending positions as half-open intervals."""
    intervals: list[list[int]] = []
    for position in positions:
        if intervals and intervals[-1][1] == position:
            intervals[-1][1] += 1
        else:
            intervals.append([position, position + 1])
    return intervals
