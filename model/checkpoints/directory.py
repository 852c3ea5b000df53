"""Checkpoint directories of every kind: a ``config.json`` and one safetensors file per part.

``config.json`` names every file with its size and sha256, so that a flipped bit is found before a
weight is used, and the checkpoint's own sha256 is that of ``config.json``. Nothing is pickled.
"""

import errno
import hashlib
import json
import os
import reprlib
import shutil
import uuid
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import torch
from pydantic import Field, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from model.checkpoints.json_files import check_regular, nesting, read_json_object
from model.config import FrozenConfig
from model.errors import CheckpointError

FORMAT_VERSION = 1
CONFIG_FILE = "config.json"
MAX_CONFIG_BYTES = 2 * 2**20
MAX_CONFIG_DEPTH = 64
MAX_HEADER_BYTES = 4 * 2**20  # of a safetensors file; the largest part has a thousand tensors
MAX_BYTES_PER_NUMBER = 8

Parts = dict[str, dict[str, Tensor]]
Shapes = Mapping[str, Mapping[str, torch.Size]]
Config = TypeVar("Config", bound=FrozenConfig)
Part = TypeVar("Part", bound=str)


class FileRecord(FrozenConfig):
    """Size and digest of one safetensors file."""

    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    num_bytes: int = Field(ge=0)


def read_format(path: Path) -> object:
    """The field ``format`` of a directory's ``config.json``; None where there is none to read."""
    try:
        return read_json_object(path / CONFIG_FILE, MAX_CONFIG_BYTES)[0].get("format")
    except (OSError, CheckpointError):
        return None


def read_config(file: Path, kind: type[Config], format_name: str) -> tuple[Config, str]:
    """A checkpoint's ``config.json``, and its sha256.

    Args:
        file: the file.
        kind: the class of its contents.
        format_name: the value of its field ``format``.

    Raises:
        CheckpointError: names the file and the field.
    """
    try:
        fields, raw = read_json_object(file, MAX_CONFIG_BYTES)
    except FileNotFoundError as exc:
        raise CheckpointError(f"{file.parent} is no checkpoint: it has no {CONFIG_FILE}") from exc
    if nesting(fields) > MAX_CONFIG_DEPTH:
        raise CheckpointError(f"{file}: nested deeper than {MAX_CONFIG_DEPTH} levels")
    if fields.get("format") != format_name:
        raise CheckpointError(f"{file}: {_other_format(fields.get('format'), format_name)}")
    if fields.get("version") != FORMAT_VERSION:
        found = reprlib.repr(fields.get("version"))
        raise CheckpointError(f"{file}: format version {found}; this build reads version {FORMAT_VERSION}")
    try:
        config = kind.model_validate_json(raw)
    except ValidationError as exc:
        error = exc.errors()[0]
        field = ".".join(str(step) for step in error["loc"]) or "(root)"
        raise CheckpointError(f"{file}: field {field[:200]!r}: {error['msg']}") from exc
    return config, hashlib.sha256(raw).hexdigest()


def _other_format(found: object, wanted: str) -> str:
    """``drorae-NOUN`` formats tell what the directory holds instead."""
    known = {"drorae-tokenizer", "drorae-generator"}
    if found in known:
        return f"holds a {str(found)[7:]}, and a {wanted[7:]} is needed here"
    return f"field 'format' is not {wanted!r}, so this is no DRoRAE checkpoint"


def read_parts(path: Path, files: Mapping[Part, FileRecord], shapes: Shapes) -> Parts:
    """Read and verify a checkpoint's tensors.

    Nothing is allocated for a file before its size, digest and header agree with the configuration.

    Args:
        path: the directory.
        files: as ``config.json`` has them.
        shapes: which tensors each part has by the configuration.

    Raises:
        CheckpointError: names the file, and the tensor where one is at fault.
    """
    paths = {part: path / f"{part}.safetensors" for part in files}
    for part, record in files.items():
        _check_size(paths[part], record, shapes[part])
    for part, record in files.items():
        _check_contents(paths[part], record, shapes[part])
    return {part: _read_part(file) for part, file in paths.items()}


def check_shapes(file: Path, found: Mapping[str, torch.Size], expected: Mapping[str, torch.Size]) -> None:
    """Whether a part has the tensors that it should have.

    Raises:
        CheckpointError: one is missing, unexpected or of another shape; names it.
    """
    for name, shape in expected.items():
        if name not in found:
            raise CheckpointError(f"{file}: tensor {name!r} is missing")
        if found[name] != shape:
            raise CheckpointError(
                f"{file}: tensor {name!r} has shape {list(found[name])}, expected {list(shape)}"
            )
    for name in found:
        if name not in expected:
            raise CheckpointError(f"{file}: unexpected tensor {name!r}")


def write_directory(
    path: Path,
    fill: Callable[[Path], Collection[str]],
    config: Callable[[dict[str, FileRecord]], FrozenConfig],
) -> str:
    """Write a checkpoint directory: complete and synced to disk, or not at all.

    Args:
        path: where; replaces a checkpoint that is there.
        fill: writes the parts' files into a directory, and names the parts.
        config: gives the contents of ``config.json`` for these files.

    Returns:
        The sha256 of ``config.json``.

    Raises:
        OSError: the disk is full, the place not writable, or taken by something that is no
            checkpoint; nothing half-written stays behind.
    """
    with staged_directory(path.absolute(), _refuse_to_replace_others) as staging:
        files = {}
        for part in sorted(fill(staging)):
            file = staging / f"{part}.safetensors"
            files[part] = FileRecord(sha256=file_sha256(file), num_bytes=file.stat().st_size)
        text = config(files).model_dump_json(indent=2) + "\n"
        (staging / CONFIG_FILE).write_text(text, encoding="utf-8")
    return hashlib.sha256(text.encode()).hexdigest()


def save_parts(parts: Parts, directory: Path) -> list[str]:
    """Write one file per part; gives the parts' names."""
    for part, tensors in parts.items():
        save_file({name: t.contiguous() for name, t in tensors.items()}, directory / f"{part}.safetensors")
    return list(parts)


@contextmanager
def staged_directory(path: Path, check: Callable[[Path], None]) -> Iterator[Path]:
    """A directory to write into that becomes ``path`` at the end, synced to disk, or leaves nothing.

    Args:
        path: absolute; a directory that is there goes away once the new one is complete.
        check: called with ``path`` first; raises where that must not be replaced.

    Raises:
        OSError: the disk is full, or the place not writable; ``path`` is as it was.
    """
    check(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    staging = path.parent / f".{path.name}.{uuid.uuid4().hex}.partial"
    try:
        staging.mkdir()
        try:
            yield staging
        except SafetensorError as exc:  # how that library puts a full disk
            raise OSError(errno.EIO, f"cannot be written: {exc}", str(path)) from exc
        for file in staging.glob("*.safetensors"):
            # safetensors writes for its owner alone; a service may run as somebody else
            shutil.copymode(staging / CONFIG_FILE, file)
        _sync_tree(staging)
        replace_directory(staging, path)
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise


def replace_directory(staging: Path, path: Path) -> None:
    """Move ``staging`` to ``path``; a directory that was there goes away only after it.

    Raises:
        OSError: ``path`` is as it was.
    """
    retired = path.parent / f".{path.name}.{uuid.uuid4().hex}.retired"
    replaces = path.exists()
    if replaces:
        os.rename(path, retired)
    try:
        os.rename(staging, path)
    except BaseException:
        if replaces:
            os.rename(retired, path)
        raise
    shutil.rmtree(retired, ignore_errors=True)


def _refuse_to_replace_others(path: Path) -> None:
    """A mistyped output path must not cost somebody a directory of photos."""
    if not path.exists():
        return
    if not path.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, "a file stands where the checkpoint should go", str(path))
    if any(path.iterdir()) and not (path / CONFIG_FILE).is_file():
        raise FileExistsError(errno.EEXIST, f"directory not empty and without {CONFIG_FILE}", str(path))


def _check_size(file: Path, record: FileRecord, shapes: Mapping[str, torch.Size]) -> None:
    """Whether a file is as large as its record says, and no larger than the configuration can make it."""
    try:
        num_bytes = check_regular(file)
    except OSError as exc:
        raise CheckpointError(f"{file}: cannot be read: {exc.strerror}") from exc
    if num_bytes != record.num_bytes:
        where = _first_cut_tensor(file, num_bytes)
        raise CheckpointError(
            f"{file}: {num_bytes} bytes where {CONFIG_FILE} says {record.num_bytes}: "
            f"truncated or replaced{where}"
        )
    count = sum(shape.numel() for shape in shapes.values())
    if num_bytes > MAX_BYTES_PER_NUMBER * count + MAX_HEADER_BYTES:
        raise CheckpointError(
            f"{file}: {num_bytes} bytes are more than {count} numbers of {CONFIG_FILE} take"
        )


def _check_contents(file: Path, record: FileRecord, shapes: Mapping[str, torch.Size]) -> None:
    """Whether a file is the recorded one, and its header names the configuration's tensors."""
    if file_sha256(file) != record.sha256:
        raise CheckpointError(f"{file}: sha256 differs from {CONFIG_FILE}: the file is corrupt or replaced")
    with file.open("rb") as stream:
        header_bytes = int.from_bytes(stream.read(8), "little")
    if header_bytes > MAX_HEADER_BYTES:
        raise CheckpointError(f"{file}: not a readable safetensors file: a header of {header_bytes} bytes")
    with _naming_unreadable(file), safe_open(file, framework="pt") as tensors:
        found = {name: torch.Size(tensors.get_slice(name).get_shape()) for name in tensors.keys()}  # noqa: SIM118
    check_shapes(file, found, shapes)


def _read_part(file: Path) -> dict[str, Tensor]:
    with _naming_unreadable(file):
        tensors = load_file(file)
    for name, tensor in tensors.items():
        if not tensor.is_floating_point():
            raise CheckpointError(f"{file}: tensor {name!r} has dtype {tensor.dtype}, expected a float type")
        if not torch.isfinite(tensor).all():
            raise CheckpointError(f"{file}: tensor {name!r} holds a NaN or infinite value")
    return tensors


@contextmanager
def _naming_unreadable(file: Path) -> Iterator[None]:
    try:
        yield
    except (SafetensorError, OSError) as exc:
        raise CheckpointError(f"{file}: not a readable safetensors file: {exc}") from exc


def _first_cut_tensor(file: Path, num_bytes: int) -> str:
    """Names the first tensor that a truncated file no longer holds whole, where its header survives."""
    with file.open("rb") as stream:
        prefix = stream.read(8)
        header_bytes = int.from_bytes(prefix, "little") if len(prefix) == 8 else 0
        if not 0 < header_bytes <= min(MAX_HEADER_BYTES, num_bytes - 8):
            return ", its header is not whole"
        try:
            header = json.loads(stream.read(header_bytes))
            header.pop("__metadata__", None)
            ends = {name: entry["data_offsets"][1] for name, entry in header.items()}
        except (ValueError, KeyError, TypeError, IndexError, AttributeError, RecursionError):
            return ", its header is corrupt"
    cut = [(end, name) for name, end in ends.items() if 8 + header_bytes + end > num_bytes]
    return f", first in tensor {min(cut)[1]!r}" if cut else ""


def file_sha256(file: Path) -> str:
    """Digest of a file's bytes, hexadecimal."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _sync_tree(directory: Path) -> None:
    for entry in [*directory.iterdir(), directory]:
        descriptor = os.open(entry, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
