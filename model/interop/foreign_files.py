"""Reading other libraries' files: JSON, safetensors whole or in shards, and pickles without their code.

Every defect of such a file is a `CheckpointError` of one sentence that names the file.
"""

import argparse
import logging
import pickle
import re
import struct
import warnings
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from model.checkpoints.directory import file_sha256
from model.checkpoints.json_files import read_json_object
from model.errors import CheckpointError
from model.interop.wrapping import unwrap

logger = logging.getLogger(__name__)

MAX_JSON_BYTES = 256 * 2**20  # statistics of a 64 x 64 grid written as lists take a good part of it
# What torch and pickle raise for bytes that are no pickle of tensors, found by cutting and flipping bytes.
_UNPICKLING_ERRORS = (
    pickle.UnpicklingError,
    RuntimeError,
    ValueError,
    EOFError,
    LookupError,
    AttributeError,
    TypeError,
    AssertionError,
    OverflowError,
    ImportError,
    struct.error,
    zipfile.BadZipFile,
)


@dataclass(frozen=True)
class ForeignTensors:
    """Tensors by the names of their library, and the files that hold them."""

    tensors: dict[str, Tensor]
    files: tuple[Path, ...]
    source: Path
    """What an error names: the file, or the index of several."""
    notes: tuple[str, ...] = ()
    """Which of the weights in a file were taken, where there was a choice."""


def record_files(*files: Path) -> dict[str, str]:
    """sha256 by file name, for a checkpoint's provenance; directories are left out."""
    return {file.name: file_sha256(file) for file in files}


def read_json(file: Path) -> dict[str, Any]:
    """A JSON file that holds an object.

    Raises:
        CheckpointError: missing, unreadable, or not a JSON object.
    """
    try:
        return read_json_object(file, MAX_JSON_BYTES)[0]
    except FileNotFoundError as exc:
        raise CheckpointError(f"{file}: cannot be read: {exc.strerror}") from exc


def read_folder(folder: Path, *stems: str) -> ForeignTensors:
    """Weights of a ``save_pretrained`` folder: safetensors before pickles, whole or in shards.

    Args:
        folder: the directory.
        stems: names of the weights' file without its suffix, such as ``model`` and ``pytorch_model``.

    Raises:
        CheckpointError: no weights, or a file that cannot be read; names it.
    """
    candidates = [f"{stem}{suffix}" for suffix in (".safetensors", ".bin") for stem in stems]
    for name in candidates:
        if (folder / name).is_file():
            return read_tensors(folder / name)
        if (folder / f"{name}.index.json").is_file():
            return _read_shards(folder / f"{name}.index.json")
    raise CheckpointError(
        f"{folder}: has no weights: none of {', '.join(candidates)}, nor an index of shards"
    )


def read_tensors(file: Path, part: str | None = None) -> ForeignTensors:
    """Tensors of a safetensors file, or of a pickle read without running any code.

    Wrappers of training programs are taken off (`model.interop.wrapping`); averaged weights come
    first.

    Args:
        file: the file.
        part: of a whole model, the module that is wanted.

    Raises:
        CheckpointError: missing, truncated, corrupt, no dictionary of tensors or several, or a pickle with
            code in it.
    """
    return _unwrapped(_read_contents(file), (file,), file, part)


def read_statistics_tensors(file: Path) -> dict[str, Tensor]:
    """The tensors ``mean`` and ``var`` of RAE's ``stat.pt``; RAE's own file for DINOv2-B has no mean (None).

    Raises:
        CheckpointError: unreadable, neither of the two, or something else beside them.
    """
    contents = _read_contents(file)
    if isinstance(contents, dict):
        contents = {name: value for name, value in contents.items() if value is not None}
    tensors = _unwrapped(contents, (file,), file).tensors
    if not tensors.keys() <= {"mean", "var"}:
        raise CheckpointError(f"{file}: holds the tensors {sorted(tensors)}, expected ['mean', 'var']")
    return tensors


def _unwrapped(
    contents: object, files: tuple[Path, ...], source: Path, part: str | None = None
) -> ForeignTensors:
    try:
        unwrapped = unwrap(contents, part)
    except CheckpointError as exc:
        raise CheckpointError(f"{source}: {exc}") from exc
    for note in unwrapped.notes:
        logger.info("%s: %s", source, note)
    return ForeignTensors(unwrapped.tensors, files, source, unwrapped.notes)


def _read_contents(file: Path) -> object:
    if not file.is_file():
        what = "is a directory, expected a file" if file.is_dir() else "there is no such file"
        raise CheckpointError(f"{file}: {what}")
    return _read_safetensors(file) if file.suffix == ".safetensors" else _read_pickle(file)


def _read_safetensors(file: Path) -> dict[str, Tensor]:
    try:
        return load_file(file)
    except (SafetensorError, OSError, ValueError) as exc:
        raise CheckpointError(f"{file}: not a readable safetensors file, or a truncated one: {exc}") from exc


def _read_pickle(file: Path) -> object:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of pickle protocols: what comes of them is told below
            with torch.serialization.safe_globals([argparse.Namespace]):  # arguments beside the weights
                return torch.load(file, map_location="cpu", weights_only=True)
    except OSError as exc:
        raise CheckpointError(f"{file}: cannot be read: {exc.strerror or exc}") from exc
    except _UNPICKLING_ERRORS as exc:
        code = re.search(r"GLOBAL (\S+)|[Uu]nsupported (?:class|operand)\S* ?(\S*)", str(exc))
        if isinstance(exc, pickle.UnpicklingError) and code:
            wanted = code.group(1) or code.group(2) or "something"
            raise CheckpointError(
                f"{file}: a pickle that asks for {wanted}, which is code and not a tensor: it was not run, "
                f"and nothing of the file is used"
            ) from exc
        raise CheckpointError(f"{file}: not a readable PyTorch file, or a truncated one") from exc


def _read_shards(index: Path) -> ForeignTensors:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index}: field 'weight_map' does not map tensors to files")
    shards: dict[str, Mapping[str, Any]] = {}
    for name, shard in weight_map.items():
        if not isinstance(shard, str) or Path(shard).name != shard:
            raise CheckpointError(f"{index}: field 'weight_map': {name!r} is in {shard!r}, no file name")
        shards.setdefault(shard, {})
    tensors: dict[str, Any] = {}
    for shard in shards:
        contents = _read_contents(index.parent / shard)
        if not isinstance(contents, dict):
            raise CheckpointError(f"{index.parent / shard}: holds no dictionary of tensors")
        shards[shard] = contents
        tensors |= contents
    for name, shard in weight_map.items():
        if name not in shards[shard]:
            raise CheckpointError(f"{index.parent / shard}: tensor {name!r} is missing")
    files = (index, *(index.parent / shard for shard in sorted(shards)))
    return _unwrapped(tensors, files, index)
