"""The generator: noise, time and class to the velocity of normalised latents, and its checkpoint.

Shape legend: B batch, C latent channels, h w latent grid.
"""

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self

import torch
from pydantic import Field
from torch import Tensor

from model.checkpoints.directory import (
    CONFIG_FILE,
    FORMAT_VERSION,
    FileRecord,
    Parts,
    Shapes,
    check_shapes,
    read_config,
    read_format,
    read_parts,
    save_parts,
    write_directory,
)
from model.checkpoints.tokenizers import resolve_checkpoint
from model.config import FrozenConfig
from model.errors import CheckpointError, LatentError, SamplingError
from model.networks.dit import GENERATOR_PRESETS, TABLES, DiT, GeneratorConfig
from model.networks.normalization import NormalizesLatents
from model.spelling import suggest
from model.tokenizer import LatentKind, Tokenizer

__all__ = [
    "GENERATOR_PRESETS",
    "Generator",
    "GeneratorConfig",
    "GeneratorInfo",
    "TrainedOn",
    "find_generator",
]

FORMAT = "drorae-generator"
SHIFT_BASE = 4096  # numbers per latent at which the time shift is 1
TimeLaw = Literal["uniform", "logit-normal"]


def default_shift(latent_shape: Sequence[int]) -> float:
    """Time shift of latents [C, h, w]: ``sqrt(C h w / 4096)``, at least 1 (RAE)."""
    return max(1.0, math.sqrt(math.prod(latent_shape) / SHIFT_BASE))


def find_generator(source: str | Path) -> Path | None:
    """The directory of a generator's checkpoint, named as for `Generator.load`; None where there is none."""
    try:
        path = resolve_checkpoint(source, GENERATOR_PRESETS)
    except CheckpointError:
        return None
    return path if read_format(path) == FORMAT else None


class TrainedOn(FrozenConfig):
    """What a generator was trained on; decides what may decode its latents, and how it is sampled."""

    tokenizer_name: str | None = Field(None, description="Name of the tokenizer that gave the latents.")
    tokenizer_sha256: str | None = Field(None, pattern=r"^[0-9a-f]{64}$", description="Its checkpoint's.")
    latent: LatentKind = Field("enriched", description="Which of the tokenizer's latents.")
    class_names: tuple[str, ...] = Field((), description="Names of the classes in order, or none.")
    time_law: TimeLaw | None = Field(None, description="Law of the times before the shift.")
    shift: float | None = Field(None, ge=1, description="Time shift; null: by the latents' size.")


class GeneratorCheckpoint(FrozenConfig):
    """Contents of a generator's ``config.json``."""

    format: Literal["drorae-generator"]
    version: Literal[1]
    generator: GeneratorConfig
    trained_on: TrainedOn
    files: dict[Literal["network", "statistics"], FileRecord]
    provenance: dict[str, Any] = Field(default_factory=dict, description="How the weights came to be.")


@dataclass(frozen=True)
class GeneratorInfo:
    """Identity of a checkpoint: the sha256 of its ``config.json`` covers every file."""

    path: Path
    name: str
    sha256: str
    provenance: dict[str, Any]


class Generator(NormalizesLatents):
    """A DiT^DH with the statistics of its latents. Weights are float32.

    Build one with `load`, or from a `GeneratorConfig` with random weights.

    Attributes:
        dtype: of the matrix products, float32 or bfloat16.
    """

    def __init__(self, config: GeneratorConfig, trained_on: TrainedOn | None = None) -> None:
        super().__init__(config.latent_shape)
        self.config = config
        self.trained_on = trained_on or TrainedOn()
        self.info: GeneratorInfo | None = None
        self.dtype = torch.float32
        self.network = DiT(config)

    @classmethod
    def load(
        cls,
        source: str | Path,
        device: str | torch.device = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> Self:
        """Load a checkpoint, without gradients and in eval mode.

        Args:
            source: a checkpoint directory, or the name of a preset with bundled weights.
            device: where the weights go.
            dtype: type of the matrix products, float32 or bfloat16.

        Raises:
            CheckpointError: missing, corrupt, foreign or of another version; names file and tensor.
        """
        path = resolve_checkpoint(source, GENERATOR_PRESETS)
        contents, digest = read_config(path / CONFIG_FILE, GeneratorCheckpoint, FORMAT)
        if "network" not in contents.files:
            raise CheckpointError(f"{path / CONFIG_FILE}: field 'files' lacks 'network'")
        names = contents.trained_on.class_names
        if names and len(names) != contents.generator.num_classes:
            raise CheckpointError(
                f"{path / CONFIG_FILE}: field 'trained_on.class_names' has {len(names)} names for "
                f"{contents.generator.num_classes} classes"
            )
        generator = cls.on_meta(contents.generator, contents.trained_on)
        generator._fill(read_parts(path, contents.files, generator.shapes()), path)
        generator.info = GeneratorInfo(path, contents.generator.name, digest, contents.provenance)
        generator.dtype = dtype
        return generator.requires_grad_(False).to(device).eval()

    @classmethod
    def from_network(
        cls,
        config: GeneratorConfig,
        state: dict[str, Tensor],
        path: Path,
        trained_on: TrainedOn | None = None,
    ) -> Self:
        """A generator of these tensors, by RAE's names, as float32.

        Args:
            config: its architecture.
            state: the network's tensors.
            path: directory that errors name.
            trained_on: what is known of it.

        Raises:
            CheckpointError: a tensor is missing, unexpected or mis-shaped; names it.
        """
        generator = cls.on_meta(config, trained_on)
        generator._fill({"network": state}, path)
        return generator.requires_grad_(False).eval()

    @classmethod
    def on_meta(cls, config: GeneratorConfig, trained_on: TrainedOn | None = None) -> Self:
        """A generator of shapes without values, which takes no memory whatever the configuration says."""
        with torch.device("meta"):
            return cls(config, trained_on)

    def shapes(self) -> Shapes:
        """Shapes of the tensors by checkpoint file, statistics included."""
        latent = torch.Size(self.config.latent_shape)
        network = {name: tensor.shape for name, tensor in self.network.state_dict().items()}
        return {"network": network, "statistics": {"mean": latent, "var": latent}}

    def save(
        self,
        path: str | Path,
        storage_dtype: torch.dtype | None = None,
        provenance: dict[str, Any] | None = None,
    ) -> GeneratorInfo:
        """Write a checkpoint directory atomically, replacing one that is there.

        Args:
            path: the directory.
            storage_dtype: type of the stored weights; by default as they are. Tables and statistics stay
                float32.
            provenance: how the weights came to be, kept in ``config.json``; any JSON.
        """
        parts = {"network": self.stored_network(storage_dtype)}
        if self.latent_mean is not None and self.latent_var is not None:
            parts["statistics"] = {"mean": self.latent_mean.cpu(), "var": self.latent_var.cpu()}

        def contents(files: dict[str, FileRecord]) -> GeneratorCheckpoint:
            return GeneratorCheckpoint.model_validate(
                {
                    "format": FORMAT,
                    "version": FORMAT_VERSION,
                    "generator": self.config,
                    "trained_on": self.trained_on,
                    "files": files,
                    "provenance": provenance or {},
                }
            )

        digest = write_directory(Path(path), lambda staging: save_parts(parts, staging), contents)
        return GeneratorInfo(Path(path), self.config.name, digest, provenance or {})

    def stored_network(self, storage_dtype: torch.dtype | None = None) -> dict[str, Tensor]:
        """The network's tensors in memory; tables keep their type."""
        return {
            name: tensor.detach().cpu().to(tensor.dtype if name in TABLES else storage_dtype or tensor.dtype)
            for name, tensor in self.network.state_dict().items()
        }

    @property
    def device(self) -> torch.device:
        return self.network.pos_embed.device

    @torch.no_grad()
    def velocity(self, latents: Tensor, time: Tensor, labels: Tensor) -> Tensor:
        """The velocity ``e - x`` at noisy latents ``(1 - t) x + t e``.

        Args:
            latents: [B, C, h, w], normalised.
            time: [B] in [0, 1]; 0 is data.
            labels: [B] int64; ``config.null_class`` for no class.

        Returns:
            [B, C, h, w] float32.
        """
        with torch.autocast(latents.device.type, torch.bfloat16, enabled=self.dtype == torch.bfloat16):
            return self.network(latents, time, labels)

    def check_inputs(self, latents: Tensor, labels: Tensor) -> None:
        """Whether `velocity` takes latents and labels; waits for the device.

        Raises:
            SamplingError: another shape, or a label that is no class.
        """
        if latents.ndim != 4 or tuple(latents.shape[1:]) != self.config.latent_shape:
            wanted = ", ".join(map(str, self.config.latent_shape))
            raise SamplingError(f"noise has shape {list(latents.shape)}, expected [B, {wanted}]")
        if labels.shape != latents.shape[:1] or labels.is_floating_point():
            raise SamplingError(f"labels have shape {list(labels.shape)}, expected [{len(latents)}] integers")
        if len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) <= self.config.null_class:
            raise SamplingError(
                f"labels go from {int(labels.min())} to {int(labels.max())}; {self.config.name!r} has "
                f"classes 0 to {self.config.num_classes - 1}, and {self.config.null_class} for none"
            )

    def class_indices(self, wanted: Collection[str]) -> list[int]:
        """Classes by name or number, from 0.

        Raises:
            SamplingError: there is no such class.
        """
        names, count = self.trained_on.class_names, self.config.num_classes
        indices = []
        for item in wanted:
            if item in names:
                indices.append(names.index(item))
            elif item.isdecimal() and int(item) < count:
                indices.append(int(item))
            else:
                known = f"classes are {', '.join(names)}" if names else "it knows classes by number alone"
                raise SamplingError(
                    f"{self.config.name} has no class {item!r}: {known}; numbers go from 0 to {count - 1}"
                    f"{suggest(item, names)}"
                )
        return indices

    def check_tokenizer(self, tokenizer: Tokenizer) -> None:
        """Whether a tokenizer decodes this generator's latents.

        Raises:
            LatentError: its latents have another shape, or the generator was trained on those of another.
        """
        if tokenizer.config.latent_shape != self.config.latent_shape:
            raise LatentError(
                f"generator {self.config.name!r} makes latents of {_shape(self.config.latent_shape)}, and "
                f"tokenizer {tokenizer.config.name!r} decodes {_shape(tokenizer.config.latent_shape)}"
            )
        wanted = self.trained_on.tokenizer_sha256
        found = tokenizer.checkpoint.sha256 if tokenizer.checkpoint else None
        if wanted is not None and wanted != found:
            raise LatentError(
                f"generator {self.config.name!r} was trained on the latents of tokenizer "
                f"{self.trained_on.tokenizer_name!r} (sha256 {wanted[:12]}), not of "
                f"{tokenizer.config.name!r} (sha256 {(found or 'none')[:12]})"
            )

    def check_guide(self, guide: "Generator") -> None:
        """Whether a guide was trained on the latents of the same tokenizer.

        Raises:
            LatentError: it was not.
        """
        wanted, found = self.trained_on.tokenizer_sha256, guide.trained_on.tokenizer_sha256
        if wanted is not None and found is not None and wanted != found:
            raise LatentError(
                f"the guide {guide.config.name!r} was trained on the latents of another tokenizer (sha256 "
                f"{found[:12]}) than {self.config.name!r} (sha256 {wanted[:12]})"
            )

    def _fill(self, parts: Parts, path: Path) -> None:
        shapes = self.shapes()
        for part, tensors in sorted(parts.items()):  # statistics last: they go to the weights' device
            file = path / f"{part}.safetensors"
            check_shapes(file, {name: tensor.shape for name, tensor in tensors.items()}, shapes[part])
            if part == "network":
                values = {name: tensor.float() for name, tensor in tensors.items()}
                self.network.load_state_dict(values, assign=True)
            else:
                try:
                    self.set_statistics(tensors["mean"], tensors["var"])
                except LatentError as exc:
                    raise CheckpointError(f"{file}: {exc}") from exc


def _shape(shape: tuple[int, int, int]) -> str:
    return " x ".join(map(str, shape))
