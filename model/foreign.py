"""Reading other libraries' files: JSON, safetensors whole or in shards, and pickles without their code.

Whatever can be wrong with such a file is a `CheckpointError` of one sentence that names it.
"""

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

from model.checkpoints import file_sha256
from model.documents import read_json_object
from model.errors import CheckpointError

MAX_JSON_BYTES = 256 * 2**20  # statistics of a 64 x 64 grid written as lists take a good part of it
# Training programs wrap the weights; the wrapped dictionary's names may carry one more prefix each.
_WRAPPERS = ("model", "module", "state_dict")
_PREFIXES = ("module.", "decoder.")
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


def read_tensors(file: Path) -> ForeignTensors:
    """Tensors of a safetensors file, or of a pickle read without running any code.

    A pickle's ``model`` or ``state_dict`` entry is taken where it is wrapped in one.

    Raises:
        CheckpointError: missing, truncated, corrupt, no dictionary of tensors, or a pickle with code in it.
    """
    if not file.is_file():
        what = "is a directory, expected a file" if file.is_dir() else "there is no such file"
        raise CheckpointError(f"{file}: {what}")
    if file.suffix == ".safetensors":
        return ForeignTensors(_read_safetensors(file), (file,), file)
    contents = _unwrap(_read_pickle(file))
    if not isinstance(contents, dict) or not contents:
        raise CheckpointError(f"{file}: holds {type(contents).__name__}, expected a dictionary of tensors")
    for name, value in contents.items():
        if not isinstance(name, str) or not isinstance(value, Tensor):
            raise CheckpointError(f"{file}: entry {name!r} is {type(value).__name__}, expected a tensor")
    return ForeignTensors(_strip_prefixes(contents), (file,), file)


def _read_safetensors(file: Path) -> dict[str, Tensor]:
    try:
        return load_file(file)
    except (SafetensorError, OSError, ValueError) as exc:
        raise CheckpointError(f"{file}: not a readable safetensors file, or a truncated one: {exc}") from exc


def _read_pickle(file: Path) -> object:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of pickle protocols: what comes of them is told below
            return torch.load(file, map_location="cpu", weights_only=True)
    except OSError as exc:
        raise CheckpointError(f"{file}: cannot be read: {exc.strerror or exc}") from exc
    except _UNPICKLING_ERRORS as exc:
        code = re.search(r"GLOBAL (\S+)|[Uu]nsupported (?:class|operand|global)\S* ?(\S*)", str(exc))
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
    shards: dict[str, dict[str, Tensor]] = {}
    for name, shard in weight_map.items():
        if not isinstance(shard, str) or Path(shard).name != shard:
            raise CheckpointError(f"{index}: field 'weight_map': {name!r} is in {shard!r}, no file name")
        shards.setdefault(shard, {})
    tensors: dict[str, Tensor] = {}
    for shard in shards:
        shards[shard] = read_tensors(index.parent / shard).tensors
        tensors |= shards[shard]
    for name, shard in weight_map.items():
        if name not in shards[shard]:
            raise CheckpointError(f"{index.parent / shard}: tensor {name!r} is missing")
    files = (index, *(index.parent / shard for shard in sorted(shards)))
    return ForeignTensors(tensors, files, index)


def _unwrap(contents: object) -> object:
    for wrapper in _WRAPPERS:
        if isinstance(contents, dict) and isinstance(contents.get(wrapper), dict):
            contents = contents[wrapper]
    return contents


def _strip_prefixes(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    for prefix in _PREFIXES:
        if all(name.startswith(prefix) for name in tensors):
            tensors = {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}
    return dict(tensors)
