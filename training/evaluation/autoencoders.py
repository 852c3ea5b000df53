"""What reconstruction is measured of: a tokenizer, or any autoencoder of diffusers that is judged beside it.

Shape legend: B batch, S image side, C h w one latent.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from model.checkpoints.directory import file_sha256
from model.checkpoints.tokenizers import CheckpointInfo
from model.tokenizer import LatentKind
from training.errors import DataError

CONFIG_FILE = "config.json"
RAE_CLASS = "AutoencoderRAE"  # takes and gives [0, 1]; the others [-1, 1]
DEFAULT_SIDE = 256


class Autoencoder(Protocol):
    """A `Tokenizer`, or what is judged as one."""

    @property
    def config(self) -> Any:
        """With ``name``, ``image_size`` and ``decoder.patch_size``."""

    @property
    def checkpoint(self) -> CheckpointInfo | None: ...

    @property
    def device(self) -> torch.device: ...

    def encode(self, images: Tensor, latent: LatentKind = "base", /) -> Tensor: ...

    def decode(self, latents: Tensor, /) -> Tensor: ...

    def reconstruct(self, images: Tensor, latent: LatentKind = "base", /) -> Tensor: ...


@dataclass(frozen=True)
class _Decoder:
    patch_size: int


@dataclass(frozen=True)
class _Config:
    name: str
    image_size: int
    decoder: _Decoder


class DiffusersAutoencoder:
    """An autoencoder of diffusers, such as ``AutoencoderKL`` (SD-VAE) or ``AutoencoderRAE``.

    A distribution's mode is its latent. Pictures are clamped.
    """

    def __init__(self, folder: Path, device: torch.device, image_size: int | None = None) -> None:
        """Load a ``save_pretrained`` folder.

        Args:
            folder: with ``config.json`` and the weights.
            device: where it runs.
            image_size: side of the images, pixels; by default the folder's, or 256.

        Raises:
            DataError: no such folder, no autoencoder of diffusers, or diffusers is not installed.
        """
        fields = _read_config(folder)
        network = _load(folder, str(fields["_class_name"]))
        self.network = network.to(device).eval().requires_grad_(False)
        self.is_unit = fields["_class_name"] == RAE_CLASS
        side = image_size or (fields.get("image_size") if self.is_unit else None) or DEFAULT_SIDE
        self.device = device
        sample = torch.zeros(1, 3, side, side, device=device)
        try:
            grid = self.encode(sample).shape[-1]
        except (RuntimeError, ValueError) as exc:
            raise DataError(f"{folder}: takes no images of {side} pixels: {exc}") from exc
        self.config = _Config(folder.name, side, _Decoder(max(1, side // grid)))
        sha256 = file_sha256(folder / CONFIG_FILE)
        self.checkpoint = CheckpointInfo(folder, folder.name, sha256, 1, {"class": fields["_class_name"]})

    @torch.no_grad()
    def encode(self, images: Tensor, latent: LatentKind = "base") -> Tensor:
        """Latents [B, C, h, w] of images [B, 3, S, S] in [0, 1]."""
        answer = self.network.encode(images if self.is_unit else 2 * images - 1)
        for name in ("latent", "latents"):
            if hasattr(answer, name):
                return getattr(answer, name)
        return answer.latent_dist.mode()

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Images [B, 3, S, S] in [0, 1] of latents [B, C, h, w]."""
        pictures = self.network.decode(latents).sample
        return (pictures if self.is_unit else (pictures + 1) / 2).clamp(0, 1)

    def reconstruct(self, images: Tensor, latent: LatentKind = "base") -> Tensor:
        """``decode(encode(images))``."""
        return self.decode(self.encode(images, latent))


def _read_config(folder: Path) -> dict[str, Any]:
    file = folder / CONFIG_FILE
    try:
        fields = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as exc:
        raise DataError(f"{file}: cannot be read: {exc}") from exc
    if not isinstance(fields, dict) or not str(fields.get("_class_name", "")).startswith("Autoencoder"):
        raise DataError(f"{file}: field '_class_name' names no autoencoder of diffusers")
    return fields


def _load(folder: Path, class_name: str) -> Any:
    try:
        import diffusers
    except ModuleNotFoundError as exc:
        raise DataError("--autoencoder needs the package 'diffusers': pip install diffusers") from exc
    kind = getattr(diffusers, class_name, None)
    if kind is None:
        raise DataError(f"{folder}: diffusers {diffusers.__version__} has no {class_name}")
    try:
        return kind.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, RuntimeError, KeyError, TypeError) as exc:
        raise DataError(f"{folder}: not a readable {class_name}: {' '.join(str(exc).split())[:300]}") from exc
