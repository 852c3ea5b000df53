"""Latents with names: a folder of `drorae tokenize` or a file of it, of `drorae encode` or of `generate`."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from cli.errors import UsageError
from service.codecs.tensors import write_safetensors

if TYPE_CHECKING:
    from training.latents.manifest import Identity

NAMES_ENTRY = "keys"
"""In the metadata of a file of `drorae encode` or `generate`: the pictures' names, as JSON."""


@dataclass(frozen=True)
class NamedLatents:
    """Latents that can be read one by one.

    Attributes:
        path: of the folder or file.
        count: rows.
        find: numbers of the rows of a name.
        read: rows by number, [N, C, h, w].
        origin: which checkpoint made them, and how, as the service writes it.
    """

    path: Path
    count: int
    find: Callable[[str], Sequence[int]]
    read: Callable[[Sequence[int]], Tensor]
    origin: Mapping[str, str]

    def take(self, rows: Sequence[int]) -> bytes:
        """A safetensors file of these rows alone."""
        return write_safetensors("latents", self.read(rows), self.origin)

    def row_of(self, key: str) -> int:
        """The row of a name.

        Raises:
            UsageError: no row has it, or several have.
        """
        found = self.find(key)
        if not found:
            raise UsageError(f"{self.path}: none of the {self.count} latents is named {key!r}")
        if len(found) > 1:
            raise UsageError(f"{self.path}: {len(found)} latents are named {key!r}: choose by --row")
        return found[0]


def open_named(path: Path) -> NamedLatents | None:
    """The latents of a folder or file that holds their names; None of another file.

    Raises:
        LatentsError: a folder of latents that is incomplete or damaged.
    """
    if path.is_dir():
        return _open_folder(path)
    if path.suffix != ".safetensors" or not path.is_file():
        return None
    try:
        file: Any = safe_open(path, framework="pt")
        latents = file.get_slice("latents")
        found = _names_and_origin(file.metadata() or {})
    except (SafetensorError, ValueError):
        return None  # whoever reads the whole file says why
    if found is None:
        return None
    keys, origin = found
    return NamedLatents(
        path,
        latents.get_shape()[0],
        lambda key: [row for row, name in enumerate(keys) if name == key],
        lambda rows: torch.cat([latents[row : row + 1] for row in rows]),
        origin,
    )


def _open_folder(path: Path) -> NamedLatents:
    from training.latents.reading.folder import LatentFolder

    folder = LatentFolder(path)
    return NamedLatents(
        path, len(folder), folder.find, lambda rows: folder.rows(rows).latents, _origin(folder.identity)
    )


def _names_and_origin(metadata: Mapping[str, str]) -> tuple[Sequence[str], dict[str, str]] | None:
    from training.latents.shards import METADATA_KEY, ShardInfo

    if METADATA_KEY in metadata:
        info = ShardInfo.model_validate_json(metadata[METADATA_KEY])
        return info.keys, _origin(info.identity)
    if NAMES_ENTRY in metadata:
        origin = {name: value for name, value in metadata.items() if name != NAMES_ENTRY}
        return json.loads(metadata[NAMES_ENTRY]), origin
    return None


def _origin(identity: "Identity") -> dict[str, str]:
    return {
        "model": identity.model,
        "checkpoint_sha256": identity.checkpoint_sha256,
        "normalized": str(identity.normalized).lower(),
        "latent": identity.latent,
    }
