"""Checkpoints of tokenizers: finding, opening and writing them.

`model.checkpoints.directory` has the mechanics of the directory.
"""

import shutil
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

from pydantic import Field
from safetensors.torch import save_file
from torch import Tensor

from model.checkpoints.directory import (
    CONFIG_FILE,
    FORMAT_VERSION,
    FileRecord,
    Parts,
    file_sha256,
    read_config,
    save_parts,
    write_directory,
)
from model.config import PRESETS, FrozenConfig, TokenizerConfig
from model.errors import CheckpointError

FORMAT = "drorae-tokenizer"
BUNDLED_DIRECTORY = Path(__file__).parents[1] / "bundled"
REQUIRED_PARTS = frozenset({"encoder", "decoder"})

PartName = Literal["encoder", "fusion", "decoder", "statistics"]


class CheckpointConfig(FrozenConfig):
    """Contents of ``config.json``."""

    format: Literal["drorae-tokenizer"]
    version: Literal[1]
    tokenizer: TokenizerConfig
    files: dict[PartName, FileRecord]
    provenance: dict[str, Any] = Field(default_factory=dict, description="How the weights came to be.")


@dataclass(frozen=True)
class CheckpointInfo:
    """Identity of a checkpoint: the sha256 of its ``config.json`` covers every file."""

    path: Path
    name: str
    sha256: str
    format_version: int
    provenance: dict[str, Any]


@dataclass(frozen=True)
class OpenedCheckpoint:
    """A checkpoint whose configuration was read, and whose tensors were not."""

    config: TokenizerConfig
    files: Mapping[PartName, FileRecord]
    info: CheckpointInfo


def resolve_checkpoint(source: str | Path, presets: Collection[str] = PRESETS) -> Path:
    """Directory of a checkpoint path, or of a preset's bundled weights.

    Args:
        source: a directory, or one of ``presets``.
        presets: names of architectures, by default of tokenizers.

    Raises:
        CheckpointError: neither; the message names the places.
    """
    path = Path(source)
    bundled = BUNDLED_DIRECTORY / str(source)
    if str(source) in presets and bundled.is_dir():  # a folder of that name is "./mini"
        return bundled
    if path.is_dir():
        return path
    if str(source) in presets:
        raise CheckpointError(f"preset {str(source)!r} has no bundled weights: give a checkpoint directory")
    if path.is_file():
        raise CheckpointError(f"{path} is a file: a checkpoint is a directory with {CONFIG_FILE}")
    bundled_names = sorted(name for name in presets if (BUNDLED_DIRECTORY / name).is_dir())
    listed = ", ".join(bundled_names) or "none"
    raise CheckpointError(f"no checkpoint directory at {path}; bundled checkpoints: {listed}")


def open_checkpoint(path: Path) -> OpenedCheckpoint:
    """Read a checkpoint directory's configuration.

    Raises:
        CheckpointError: names the file and the field.
    """
    config, digest = read_config(path / CONFIG_FILE, CheckpointConfig, FORMAT)
    required = REQUIRED_PARTS | ({"fusion"} if config.tokenizer.fusion else set())
    for part in sorted(required - set(config.files)):
        raise CheckpointError(f"{path / CONFIG_FILE}: field 'files' lacks {part!r}")
    if "fusion" in config.files and config.tokenizer.fusion is None:
        raise CheckpointError(f"{path / CONFIG_FILE}: field 'files' has 'fusion' but the tokenizer has none")
    info = CheckpointInfo(path, config.tokenizer.name, digest, config.version, config.provenance)
    return OpenedCheckpoint(config.tokenizer, config.files, info)


def write_checkpoint(
    path: Path, config: TokenizerConfig, parts: Parts, provenance: dict[str, Any]
) -> CheckpointInfo:
    """Write a checkpoint directory: complete and synced to disk, or not at all.

    Raises:
        OSError: the disk is full, the place not writable, or taken by something that is no
            checkpoint; nothing half-written stays behind.
    """
    digest = write_directory(
        path, lambda staging: save_parts(parts, staging), partial(_contents, config, provenance)
    )
    return CheckpointInfo(path, config.name, digest, FORMAT_VERSION, provenance)


def write_with_statistics(
    source: Path, target: Path, mean: Tensor, var: Tensor, provenance: dict[str, Any]
) -> CheckpointInfo:
    """Copy a checkpoint, with latent statistics; its weight files stay the same byte for byte.

    Args:
        source: a checkpoint directory.
        target: where the new one goes, complete or not at all; replaces a checkpoint that is there, which
            may be the source.
        mean, var: of the enriched latents per position, each [C, h, w].
        provenance: of the statistics: joins the checkpoint's own as its entry ``statistics``.

    Raises:
        CheckpointError: the source is missing, corrupt or foreign; names the file.
        OSError: the disk is full, or the target not writable; the target is as it was.
    """
    config, _ = read_config(source / CONFIG_FILE, CheckpointConfig, FORMAT)
    kept = {part: record for part, record in config.files.items() if part != "statistics"}

    def fill(staging: Path) -> list[str]:
        for part, record in kept.items():
            name = f"{part}.safetensors"
            shutil.copyfile(source / name, staging / name)
            if file_sha256(staging / name) != record.sha256:
                raise CheckpointError(
                    f"{source / name}: sha256 differs from {CONFIG_FILE}: the file is corrupt"
                )
        tensors = {"mean": mean.float().cpu().contiguous(), "var": var.float().cpu().contiguous()}
        save_file(tensors, staging / "statistics.safetensors")
        return [*kept, "statistics"]

    joined = {**config.provenance, "statistics": provenance}
    digest = write_directory(target, fill, partial(_contents, config.tokenizer, joined))
    return CheckpointInfo(target, config.tokenizer.name, digest, FORMAT_VERSION, joined)


def _contents(
    tokenizer: TokenizerConfig, provenance: dict[str, Any], files: dict[str, FileRecord]
) -> CheckpointConfig:
    return CheckpointConfig.model_validate(
        {
            "format": FORMAT,
            "version": FORMAT_VERSION,
            "tokenizer": tokenizer,
            "files": files,
            "provenance": provenance,
        }
    )
