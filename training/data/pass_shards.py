"""Finished work of a pass over images, in files of which each one says what it covers."""

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
        tensors = {name: tensor.contiguous() for name, tensor in shard.tensors.items()}
        file = self.directory / f"shard-{shard.positions[0]:09d}.safetensors"
        write_atomically(file, save(tensors, metadata={"shard": json.dumps(facts)}))

    def remove(self) -> None:
        """Delete the directory: the pass is finished and its result is safe."""
        if self.directory is not None:
            shutil.rmtree(self.directory, ignore_errors=True)

    def _read(self, file: Path) -> Shard:
        try:
            with safe_open(file, framework="pt") as stream:
                facts = json.loads((stream.metadata() or {})["shard"])
                tensors = {name: stream.get_tensor(name) for name in stream.keys()}  # noqa: SIM118
            positions = [p for low, high in facts["positions"] for p in range(low, high)]
            found, shard = facts["identity"], Shard(positions, tensors, facts["facts"])
        except (SafetensorError, OSError, ValueError, KeyError, TypeError) as exc:
            raise DataError(f"{file}: not a shard of a run: delete it to compute its images again") from exc
        changed = sorted(name for name in self.identity if found.get(name) != self.identity[name])
        if changed:
            raise TrainingError(
                f"{self.directory} holds an unfinished run with other {', '.join(changed)}: "
                "finish that one, or delete the directory"
            )
        return shard


def listing_digest(samples: Sequence[Sample]) -> str:
    """Digest of the listed images by name, place and size, not of their contents."""
    digest = hashlib.sha256()
    for sample in samples:
        digest.update(f"{sample.key}\0{sample.file_name}\0{sample.offset}\0{sample.num_bytes}\n".encode())
    return digest.hexdigest()


def _to_intervals(positions: Sequence[int]) -> list[list[int]]:
    """Ascending positions as half-open intervals."""
    intervals: list[list[int]] = []
    for position in positions:
        if intervals and intervals[-1][1] == position:
            intervals[-1][1] += 1
        else:
            intervals.append([position, position + 1])
    return intervals
