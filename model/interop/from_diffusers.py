"""Tokenizers from folders of diffusers' ``AutoencoderRAE``.

The result is a plain single-layer RAE (``fusion=None``), unless the folder is an export of this package
that carries its fusion. diffusers itself is not needed.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from model.checkpoints.directory import Parts
from model.checkpoints.tokenizers import FORMAT
from model.config import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    FusionConfig,
    PixelTriple,
    TokenizerConfig,
)
from model.errors import CheckpointError
from model.interop.assembly import (
    CONFIG_FILE,
    Imported,
    assemble,
    check_finite,
    describe_source,
    naming,
    read_statistics,
)
from model.interop.diffusers_config import (
    CLASS_NAME,
    FUSION_FORMAT,
    FUSION_STEM,
    WEIGHTS_STEM,
    AutoencoderRaeConfig,
    LatentStatistics,
    decoder_of,
    encoder_of,
    parse_config,
    statistics_from_diffusers,
)
from model.interop.foreign_files import ForeignTensors, read_folder, read_json, read_tensors
from model.interop.rae_decoder_weights import decoder_grid, decoder_state_from_diffusers
from model.interop.transformers_weights import encoder_state_from_transformers

_BUFFERS = ("encoder_mean", "encoder_std", "_latents_mean", "_latents_std")
_Sections = dict[str, dict[str, Tensor]]


def import_autoencoder(folder: Path, name: str, statistics: Path | None = None) -> Imported:
    """A tokenizer from a folder that ``AutoencoderRAE.save_pretrained`` or an export wrote.

    Args:
        folder: with ``config.json`` and the weights, whole or in shards.
        name: of the new tokenizer.
        statistics: RAE's ``stat.pt``, to be used instead of the folder's own.

    Raises:
        CheckpointError: names the file, and the tensor or field where one is at fault.
    """
    config_file = folder / CONFIG_FILE
    fields = read_json(config_file)
    with naming(config_file):
        _refuse_other_folders(fields)
        foreign_config = parse_config(fields)
    weights = read_folder(folder, WEIGHTS_STEM)
    check_finite(weights)
    sections = _sections(weights)
    fusion, fusion_tensors = _read_fusion(folder)
    with naming(config_file):
        config = _tokenizer_config(name, foreign_config, fusion, sections["buffers"])
    with naming(weights.source):
        decoder_grid(sections["decoder"], config.decoder.position_span)
        parts: Parts = {
            "encoder": encoder_state_from_transformers(sections["encoder"], config.encoder),
            "decoder": decoder_state_from_diffusers(sections["decoder"], config),
        }
        latent_statistics = _statistics(foreign_config, sections["buffers"], config.latent_shape)
    provenance = {
        "autoencoder": describe_source(CLASS_NAME, config_file, *weights.files, notes=weights.notes)
    }
    if fusion_tensors is not None:
        parts["fusion"] = fusion_tensors.tensors
        provenance["fusion"] = describe_source(FUSION_FORMAT, *fusion_tensors.files)
    if statistics is not None:
        latent_statistics = read_statistics(statistics, config.latent_shape)
        provenance["statistics"] = describe_source("RAE", statistics)
    notes = [f"{weights.source}: {note}" for note in weights.notes]
    return assemble(config, parts, latent_statistics, folder, provenance, notes)


def _refuse_other_folders(fields: Mapping[str, Any]) -> None:
    if fields.get("format") == FORMAT:
        raise CheckpointError("this is a DRoRAE checkpoint already")
    if "_class_name" not in fields and "model_type" in fields:
        raise CheckpointError(
            f"this is a transformers model ({fields['model_type']!r}), which has no decoder: import it as "
            f"the encoder, beside a decoder"
        )


def _sections(weights: ForeignTensors) -> _Sections:
    """Tensors of an ``AutoencoderRAE`` by part, without the part's prefix."""
    sections: _Sections = {"encoder": {}, "decoder": {}, "buffers": {}}
    for name, tensor in weights.tensors.items():
        part, _, rest = name.partition(".")
        if part in ("encoder", "decoder") and rest:
            sections[part][rest] = tensor
        elif name in _BUFFERS:
            sections["buffers"][name] = tensor
        else:
            raise CheckpointError(f"{weights.source}: unexpected tensor {name!r}")
    return sections


def _read_fusion(folder: Path) -> tuple[FusionConfig | None, ForeignTensors | None]:
    """The fusion that an export of this package keeps beside the autoencoder."""
    file = folder / f"{FUSION_STEM}.json"
    if not file.is_file():
        return None, None
    fields = read_json(file)
    with naming(file):
        if fields.get("format") != FUSION_FORMAT:
            raise CheckpointError(f"field 'format' is {fields.get('format')!r}, expected {FUSION_FORMAT!r}")
        config = FusionConfig.model_validate(fields.get("fusion"))
    tensors = read_tensors(folder / f"{FUSION_STEM}.safetensors")
    check_finite(tensors)
    return config, tensors


def _tokenizer_config(
    name: str, config: AutoencoderRaeConfig, fusion: FusionConfig | None, buffers: Mapping[str, Tensor]
) -> TokenizerConfig:
    encoder = encoder_of(config)
    pixel_std = _pixel_triple("encoder_std", buffers, config.encoder_norm_std or IMAGENET_STD)
    if min(pixel_std) <= 0:
        raise CheckpointError(f"'encoder_std' is {list(pixel_std)}, expected numbers above 0")
    return TokenizerConfig(
        name=name,
        image_size=config.image_size or config.patch_size * encoder.grid,
        encoder=encoder,
        fusion=fusion,
        decoder=decoder_of(config, encoder.grid),
        pixel_mean=_pixel_triple("encoder_mean", buffers, config.encoder_norm_mean or IMAGENET_MEAN),
        pixel_std=pixel_std,
    )


def _pixel_triple(
    name: str, buffers: Mapping[str, Tensor], configured: list[float] | PixelTriple
) -> PixelTriple:
    """Mean or deviation of the pixels; the stored buffer wins, as it does in diffusers."""
    values = list(configured)
    stored = buffers[name].flatten().tolist() if name in buffers else values
    if len(stored) != 3 or len(values) != 3:
        raise CheckpointError(f"{name!r} has {len(stored)} numbers, expected one for each of 3 channels")
    if torch.tensor(values).tolist() == stored:  # the same but for float32's rounding
        stored = values
    return stored[0], stored[1], stored[2]


def _statistics(
    config: AutoencoderRaeConfig, buffers: Mapping[str, Tensor], latent_shape: tuple[int, int, int]
) -> LatentStatistics | None:
    def stored(name: str, configured: Any, default: float) -> Tensor:
        if name in buffers:
            return buffers[name]
        return torch.tensor([default] if configured is None else configured, dtype=torch.float32)

    mean = stored("_latents_mean", config.latents_mean, 0.0)
    std = stored("_latents_std", config.latents_std, 1.0)
    return statistics_from_diffusers(mean, std, config.scaling_factor, latent_shape)
