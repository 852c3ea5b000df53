"""Tokenizers from an encoder of transformers and RAE's own files: ``model.pt``, ``stat.pt``.

The result is a plain single-layer RAE (arXiv 2510.11690): ``fusion=None``. transformers is not needed.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from model.config import DecoderConfig, PixelTriple, TokenizerConfig
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
from model.interop.foreign_files import (
    ForeignTensors,
    read_folder,
    read_json,
    read_statistics_tensors,
    read_tensors,
)
from model.interop.rae_decoder_weights import (
    decoder_config_from_state,
    decoder_grid,
    decoder_latent_width,
    decoder_state_from_diffusers,
)
from model.interop.transformers_config import (
    encoder_config_from_transformers,
    pixel_statistics_from_transformers,
)
from model.interop.transformers_weights import encoder_state_from_transformers
from model.networks.decoder import Decoder

PREPROCESSOR_FILE = "preprocessor_config.json"
WEIGHTS_STEMS = ("model", "pytorch_model")
DEFAULT_IMAGE_SIZE = 256


@dataclass(frozen=True)
class RaeSources:
    """The parts that an RAE is put together from."""

    encoder: Path
    """Folder of a transformers encoder."""
    decoder: Path | DecoderConfig
    """RAE's decoder file, or the architecture of a new one with random weights."""
    statistics: Path | None = None
    """RAE's ``stat.pt``."""
    image_size: int | None = None
    """Side of the images, pixels; by default as the decoder's positions or the statistics say, or 256."""
    num_heads: int | None = None
    """Of the decoder, where its width is none of RAE's."""
    seed: int = 0
    """Of a new decoder's weights."""


@dataclass(frozen=True)
class _Decoder:
    """A decoder's architecture, with the file that it is read from, if it is."""

    config: DecoderConfig
    file: ForeignTensors | None

    @classmethod
    def read(cls, sources: RaeSources, latent_width: int) -> "_Decoder":
        if isinstance(sources.decoder, DecoderConfig):
            return cls(sources.decoder, None)
        file = read_tensors(sources.decoder, part="decoder")
        check_finite(file)
        with naming(file.source):
            config = decoder_config_from_state(file.tensors, sources.num_heads)
            width = decoder_latent_width(file.tensors)
            if width != latent_width:
                raise CheckpointError(
                    f"this decoder takes latents of width {width}, and the encoder gives width {latent_width}"
                )
        return cls(config, file)

    def state(self, config: TokenizerConfig, seed: int) -> dict[str, Tensor]:
        """Its tensors by our names."""
        if self.file is not None:
            with naming(self.file.source):
                return decoder_state_from_diffusers(self.file.tensors, config)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return Decoder(config).state_dict()


def import_rae(sources: RaeSources, name: str) -> Imported:
    """A tokenizer from a transformers encoder, RAE's decoder and, if there are any, RAE's statistics.

    Args:
        sources: the files.
        name: of the new tokenizer.

    Raises:
        CheckpointError: names the file, and the tensor or field where one is at fault; parts that do not
            go together, by latent width or grid, are both named.
    """
    config_file = sources.encoder / CONFIG_FILE
    fields = read_json(config_file)
    with naming(config_file):
        native = encoder_config_from_transformers(fields)
        pixels = _preprocessor(sources.encoder) or pixel_statistics_from_transformers(fields)
    decoder = _Decoder.read(sources, native.width)
    grid = _common_grid(sources, decoder)
    with naming(config_file):
        config = TokenizerConfig(
            name=name,
            image_size=grid * decoder.config.patch_size,
            encoder=encoder_config_from_transformers(fields, grid * native.patch_size),
            fusion=None,
            decoder=decoder.config,
            pixel_mean=pixels[0],
            pixel_std=pixels[1],
        )
    statistics = read_statistics(sources.statistics, config.latent_shape) if sources.statistics else None
    weights = read_folder(sources.encoder, *WEIGHTS_STEMS)
    check_finite(weights)
    with naming(weights.source):
        encoder_state = encoder_state_from_transformers(weights.tensors, config.encoder)
    parts = {"encoder": encoder_state, "decoder": decoder.state(config, sources.seed)}
    provenance: dict[str, Any] = {
        "encoder": describe_source(
            f"transformers {fields['model_type']}", config_file, *weights.files, notes=weights.notes
        ),
        "decoder": {"format": "random", "seed": sources.seed},
    }
    if decoder.file is not None:
        provenance["decoder"] = describe_source("RAE", *decoder.file.files, notes=decoder.file.notes)
    if sources.statistics is not None:
        provenance["statistics"] = describe_source("RAE", sources.statistics)
    notes = [f"{read.source}: {note}" for read in (weights, decoder.file) if read for note in read.notes]
    return assemble(config, parts, statistics, sources.encoder, provenance, notes)


def _common_grid(sources: RaeSources, decoder: _Decoder) -> int:
    """Side of the latent grid, on which the decoder, the statistics and the wanted images must agree."""
    patch_size, side = decoder.config.patch_size, sources.image_size
    claims: list[tuple[int, str]] = []
    if side is not None:
        if side % patch_size:
            raise CheckpointError(
                f"images of {side} pixels are not divisible by the decoder's patch of {patch_size} pixels"
            )
        claims.append((side // patch_size, f"an image of {side} pixels in patches of {patch_size}"))
    if decoder.file is not None:
        with naming(decoder.file.source):
            grid = decoder_grid(decoder.file.tensors)
        if grid is not None:
            claims.append((grid, f"the decoder in {decoder.file.source}"))
    if sources.statistics is not None:
        for name, tensor in sorted(read_statistics_tensors(sources.statistics).items()):
            if tensor.ndim >= 3:
                claims.append((tensor.shape[-1], f"the {name} in {sources.statistics}"))
    if not claims:
        return max(DEFAULT_IMAGE_SIZE // patch_size, 1)
    wanted, first = claims[0]
    for grid, what in claims[1:]:
        if grid != wanted:
            raise CheckpointError(
                f"{first} has a latent grid of {wanted} x {wanted}, but {what} one of {grid} x {grid}"
            )
    return wanted


def _preprocessor(folder: Path) -> tuple[PixelTriple, PixelTriple] | None:
    """Pixel mean and deviation of an image processor, where the folder has one that names them."""
    file = folder / PREPROCESSOR_FILE
    if not file.is_file():
        return None
    fields = read_json(file)
    if fields.get("image_mean") is None or fields.get("image_std") is None:
        return None

    def triple(name: str) -> PixelTriple:
        values = fields[name]
        if (
            not isinstance(values, list)
            or len(values) != 3
            or {type(value) for value in values} - {int, float}
        ):
            raise CheckpointError(f"{file.name}: field {name!r} is {values!r}, expected three numbers")
        return values[0], values[1], values[2]

    return triple("image_mean"), triple("image_std")
