"""Steps of every import: name the file that is at fault, check values, put the tokenizer together.

`model.interop.from_diffusers` and `model.interop.from_rae` read the sources.

Shape legend: C latent width, h w latent grid.
"""

import errno
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError

from model.checkpoints.directory import Parts
from model.config import TokenizerConfig
from model.errors import CheckpointError, ModelError
from model.interop.diffusers_config import LatentStatistics
from model.interop.foreign_files import ForeignTensors, read_statistics_tensors, record_files
from model.tokenizer import Tokenizer

CONFIG_FILE = "config.json"


@dataclass(frozen=True)
class Imported:
    """A tokenizer, where it came from (any JSON, without paths), and what its user should know."""

    tokenizer: Tokenizer
    provenance: dict[str, Any]
    notes: tuple[str, ...] = ()


@contextmanager
def naming(file: Path) -> Iterator[None]:
    """Prefixes errors about a file's contents with its name; pydantic's errors become sentences."""
    try:
        yield
    except ValidationError as exc:
        error = exc.errors()[0]
        field = ".".join(str(step) for step in error["loc"])
        what = f"field {field!r}: " if field else ""
        raise CheckpointError(f"{file}: {what}{error['msg'].removeprefix('Value error, ')}") from exc
    except ModelError as exc:
        raise CheckpointError(f"{file}: {exc}") from exc


def check_finite(weights: ForeignTensors) -> None:
    """Refuse broken weights by the name that their file has for them.

    Raises:
        CheckpointError: a tensor holds a NaN or infinite value.
    """
    for name, tensor in weights.tensors.items():
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise CheckpointError(f"{weights.source}: tensor {name!r} holds a NaN or infinite value")


def describe_source(kind: str, *files: Path, notes: Sequence[str] = ()) -> dict[str, Any]:
    """A source for the provenance: its format, the sha256 of every file by its name alone, choices made."""
    source: dict[str, Any] = {"format": kind, "files": record_files(*files)}
    return {**source, "notes": list(notes)} if notes else source


def read_statistics(file: Path, latent_shape: tuple[int, int, int]) -> LatentStatistics:
    """RAE's ``stat.pt``: ``mean`` and ``var``, each [C, h, w], with leading sides of 1 or without.

    As in RAE a mean that is absent counts as 0, a variance as 1.

    Raises:
        CheckpointError: other tensors, or a wrong shape or value.
    """
    tensors = read_statistics_tensors(file)
    notes = tuple(
        f"{file}: holds no {name}, which counts as {value}"
        for name, value in (("mean", 0), ("var", 1))
        if name not in tensors
    )
    for name, tensor in tensors.items():
        while tensor.ndim > 3 and tensor.shape[0] == 1:
            tensor = tensor[0]
        tensors[name] = tensor.float().contiguous()
        if tuple(tensor.shape) != latent_shape:
            found, wanted = list(tensor.shape), list(latent_shape)
            raise CheckpointError(f"{file}: tensor {name!r} has shape {found}, but the latents have {wanted}")
        if not torch.isfinite(tensor).all():
            raise CheckpointError(f"{file}: tensor {name!r} holds a NaN or infinite value")
    mean = tensors.get("mean", torch.zeros(latent_shape))
    var = tensors.get("var", torch.ones(latent_shape))
    if (var < 0).any():
        raise CheckpointError(f"{file}: tensor 'var' has a negative value")
    return LatentStatistics(mean, var, notes=notes)


def refuse_to_replace(path: Path) -> None:
    """For `staged_directory`: an export goes to a new or empty directory.

    Raises:
        FileExistsError: something is there.
    """
    if path.is_dir() and not any(path.iterdir()):
        return
    if path.exists():
        raise FileExistsError(errno.EEXIST, "is there already and not an empty directory", str(path))


def assemble(
    config: TokenizerConfig,
    parts: Parts,
    statistics: LatentStatistics | None,
    source: Path,
    provenance: dict[str, Any],
    notes: Sequence[str] = (),
) -> Imported:
    """A frozen tokenizer of translated tensors.

    Raises:
        CheckpointError: a tensor is no float type, or is not one of the configuration's.
    """
    notes = list(notes)
    for part, tensors in parts.items():
        for name, tensor in tensors.items():
            if not tensor.is_floating_point():
                raise CheckpointError(
                    f"{source}: the {part}'s {name!r} is {tensor.dtype}, expected a float type"
                )
    if statistics is not None:
        parts = {**parts, "statistics": {"mean": statistics.mean, "var": statistics.var}}
        notes += statistics.notes
        if statistics.num_clamped:
            provenance = {**provenance, "num_clamped_deviations": statistics.num_clamped}
            notes.append(
                f"{statistics.num_clamped} of {statistics.var.numel()} latent positions deviate by less than "
                f"0.0032, the least that can be stored: normalised, they come out smaller than in the source"
            )
    tokenizer = Tokenizer.from_parts(config, parts, source)
    for module in (tokenizer.encoder, tokenizer.fusion, tokenizer.decoder):
        if module is not None:
            module.freeze()
    return Imported(tokenizer.eval(), {"imported": provenance}, tuple(notes))
