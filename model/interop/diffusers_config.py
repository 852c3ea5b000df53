"""diffusers' ``AutoencoderRAE`` by its configuration: which encoder it builds, and its latent statistics.

Pure functions; the tensors' names are in `model.interop.transformers_weights` and
`model.interop.rae_decoder_weights`.

diffusers normalises latents as ``(z - mean) / (std + 1e-5)``, always, and then multiplies them by
``scaling_factor``; RAE and this package as ``(z - mean) / sqrt(var + 1e-5)``. The statistics are translated
so that both give the same numbers.

Shape legend: C latent width, h w latent grid.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from pydantic import Field, ValidationError
from torch import Tensor

from model.config import DecoderConfig, EncoderConfig, FrozenConfig
from model.errors import CheckpointError
from model.interop.transformers_config import encoder_config_from_transformers
from model.interop.transformers_weights import TransformersRelease

CLASS_NAME = "AutoencoderRAE"
WEIGHTS_STEM = "diffusion_pytorch_model"
FUSION_STEM = "fusion"  # .json and .safetensors: what an export keeps beside the autoencoder
FUSION_FORMAT = "drorae-fusion"
DIFFUSERS_VERSION = "0.42.1"  # whose fields and defaults these are
DIFFUSERS_EPS = 1e-5
VARIANCE_EPS = 1e-5  # `model.networks.normalization.STATISTICS_EPS`, RAE's
# AutoencoderRAE lays its decoder's positions over 16 units whatever the grid, MAE and RAE one unit a patch.
POSITION_SPAN = 16
_HEAD_WIDTH = 64
# The rest of what AutoencoderRAE gives each encoder that it builds, by transformers' fields.
_ENCODERS: dict[str, dict[str, Any]] = {
    "dinov2": {"model_type": "dinov2_with_registers", "image_size": 518, "num_register_tokens": 4},
    "siglip2": {"model_type": "siglip_vision_model", "image_size": 256, "intermediate_size": 3072},
    "mae": {"model_type": "vit_mae", "image_size": 224, "intermediate_size": 3072},
}


class AutoencoderRaeConfig(FrozenConfig):
    """Fields of ``AutoencoderRAE``'s ``config.json``, with its defaults."""

    encoder_type: Literal["dinov2", "siglip2", "mae"] = "dinov2"
    encoder_hidden_size: int = Field(768, ge=_HEAD_WIDTH)
    encoder_patch_size: int = Field(14, ge=1)
    encoder_num_hidden_layers: int = Field(12, ge=1)
    decoder_hidden_size: int = Field(512, ge=1)
    decoder_num_hidden_layers: int = Field(8, ge=1)
    decoder_num_attention_heads: int = Field(16, ge=1)
    decoder_intermediate_size: int = Field(2048, ge=1)
    patch_size: int = Field(16, ge=1)
    encoder_input_size: int = Field(224, ge=1)
    image_size: int | None = None
    num_channels: Literal[3] = 3
    encoder_norm_mean: list[float] | None = None
    encoder_norm_std: list[float] | None = None
    latents_mean: Any = None
    latents_std: Any = None
    noise_tau: float = Field(0.0, description="Of training alone.")
    reshape_to_2d: Literal[True] = True
    use_encoder_loss: bool = Field(False, description="Of training alone.")
    scaling_factor: float = Field(1.0, gt=0)


@dataclass(frozen=True)
class LatentStatistics:
    """Mean and variance per position, each [C, h, w] float32, for ``(z - mean) / sqrt(var + 1e-5)``."""

    mean: Tensor
    var: Tensor
    num_clamped: int = 0
    """Positions whose deviation is too small to be a variance of ours; they got variance 0."""
    notes: tuple[str, ...] = ()
    """What their user should know."""


def parse_config(fields: Mapping[str, Any]) -> AutoencoderRaeConfig:
    """``config.json`` of an ``AutoencoderRAE`` folder.

    Raises:
        CheckpointError: another class, an unknown field, or a value that is not supported; names the field.
    """
    if fields.get("_class_name") != CLASS_NAME:
        found = fields.get("_class_name")
        raise CheckpointError(f"field '_class_name' is {found!r}, expected {CLASS_NAME!r}")
    known = {name: value for name, value in fields.items() if not name.startswith("_")}
    try:
        return AutoencoderRaeConfig.model_validate(known)
    except ValidationError as exc:
        error = exc.errors()[0]
        field = ".".join(str(step) for step in error["loc"])
        raise CheckpointError(f"field {field!r}: {error['msg']}, not {error['input']!r}") from exc


def encoder_of(config: AutoencoderRaeConfig) -> EncoderConfig:
    """The encoder that ``AutoencoderRAE`` builds from its configuration.

    Raises:
        CheckpointError: the input side is no multiple of the patch, or another field cannot be.
    """
    fields = {
        **_ENCODERS[config.encoder_type],
        "hidden_size": config.encoder_hidden_size,
        "patch_size": config.encoder_patch_size,
        "num_hidden_layers": config.encoder_num_hidden_layers,
        "num_attention_heads": config.encoder_hidden_size // _HEAD_WIDTH,
    }
    return encoder_config_from_transformers(fields, config.encoder_input_size)


def decoder_of(config: AutoencoderRaeConfig, grid: int) -> DecoderConfig:
    """The decoder that ``AutoencoderRAE`` builds for a latent grid of this side.

    Raises:
        ValidationError: pydantic's, for sizes that cannot be.
    """
    return DecoderConfig(
        width=config.decoder_hidden_size,
        depth=config.decoder_num_hidden_layers,
        num_heads=config.decoder_num_attention_heads,
        mlp_width=config.decoder_intermediate_size,
        patch_size=config.patch_size,
        position_span=None if grid == POSITION_SPAN else POSITION_SPAN,
    )


def decoder_fields(decoder: DecoderConfig, grid: int) -> dict[str, Any]:
    """The fields of ``AutoencoderRAE`` that make it build this decoder.

    Raises:
        CheckpointError: it builds none like this; names what differs.
    """
    fields = {
        "decoder_hidden_size": decoder.width,
        "decoder_num_hidden_layers": decoder.depth,
        "decoder_num_attention_heads": decoder.num_heads,
        "decoder_intermediate_size": decoder.mlp_width,
        "patch_size": decoder.patch_size,
    }
    if (decoder.position_span or grid) != POSITION_SPAN:
        raise CheckpointError(
            f"decoder.position_span={decoder.position_span}: {CLASS_NAME} lays a decoder's positions over "
            f"{POSITION_SPAN} units, so for a latent grid of {grid} x {grid} no others can be exported"
        )
    expected = DecoderConfig().layer_norm_eps
    if decoder.layer_norm_eps != expected:
        raise CheckpointError(
            f"decoder.layer_norm_eps={decoder.layer_norm_eps}: {CLASS_NAME} builds decoders with {expected} "
            f"and nothing else"
        )
    return fields


def encoder_fields(encoder: EncoderConfig) -> dict[str, Any]:
    """The fields of ``AutoencoderRAE`` that make it build this encoder.

    Raises:
        CheckpointError: it builds none like this; names what differs.
    """
    family = "dinov2" if encoder.layer_scale else "mae" if encoder.class_token else "siglip2"
    fields = {
        "encoder_type": family,
        "encoder_hidden_size": encoder.width,
        "encoder_patch_size": encoder.patch_size,
        "encoder_num_hidden_layers": encoder.depth,
        "encoder_input_size": encoder.image_size,
    }
    if encoder.width < _HEAD_WIDTH:
        raise CheckpointError(
            f"encoder.width={encoder.width}: {CLASS_NAME} builds heads of {_HEAD_WIDTH} numbers, so no "
            f"encoder that narrow"
        )
    ours, theirs = _architecture(encoder), _architecture(encoder_of(parse_config(_with_class(fields))))
    for name, value in ours.items():
        if theirs[name] != value:
            raise CheckpointError(
                f"encoder.{name}={value!r}: {CLASS_NAME} builds {family} encoders of width {encoder.width} "
                f"with {name}={theirs[name]!r} and nothing else"
            )
    return fields


def filler_tensors(encoder: EncoderConfig, release: TransformersRelease) -> dict[str, Tensor]:
    """Tensors of the encoder that ``AutoencoderRAE`` builds, wants to find and never uses; zeros.

    DINOv2's mask token, and SigLIP's pooling head.
    """
    width, mlp_width = encoder.width, encoder.mlp_width
    if encoder.layer_scale:
        return {"embeddings.mask_token": torch.zeros(1, width)}
    if encoder.class_token:
        return {}
    prefix = "vision_model.head." if release == 4 else "head."
    shapes = {
        "probe": (1, 1, width),
        "attention.in_proj_weight": (3 * width, width),
        "attention.in_proj_bias": (3 * width,),
        "attention.out_proj.weight": (width, width),
        "attention.out_proj.bias": (width,),
        "layernorm.weight": (width,),
        "layernorm.bias": (width,),
        "mlp.fc1.weight": (mlp_width, width),
        "mlp.fc1.bias": (mlp_width,),
        "mlp.fc2.weight": (width, mlp_width),
        "mlp.fc2.bias": (width,),
    }
    return {prefix + name: torch.zeros(shape) for name, shape in shapes.items()}


def statistics_from_diffusers(
    mean: Tensor, std: Tensor, scaling_factor: float, latent_shape: tuple[int, int, int]
) -> LatentStatistics | None:
    """Statistics that normalise as ``AutoencoderRAE`` does, its ``scaling_factor`` included.

    Args:
        mean: ``_latents_mean``, [C, h, w] or a shape that broadcasts to it.
        std: ``_latents_std``, likewise.
        scaling_factor: from the configuration.
        latent_shape: (C, h, w).

    Returns:
        None where the latents are not normalised at all.

    Raises:
        CheckpointError: a shape that does not broadcast, a non-finite value or a deviation below 0.
    """
    deviation = (std.double() + DIFFUSERS_EPS) / scaling_factor
    if (
        mean.numel() == std.numel() == 1
        and mean.item() == 0
        and abs(deviation.item() - 1) <= 2 * DIFFUSERS_EPS
    ):
        return None
    for name, tensor in (("_latents_mean", mean), ("_latents_std", std)):
        try:
            torch.broadcast_to(tensor, latent_shape)
        except RuntimeError as exc:
            found, wanted = list(tensor.shape), list(latent_shape)
            raise CheckpointError(f"tensor {name!r} has shape {found}, expected {wanted}") from exc
        if not torch.isfinite(tensor).all():
            raise CheckpointError(f"tensor {name!r} holds a NaN or infinite value")
    if (std < 0).any():
        raise CheckpointError("tensor '_latents_std' has a negative value")
    var = torch.broadcast_to(deviation.square() - VARIANCE_EPS, latent_shape)
    return LatentStatistics(
        torch.broadcast_to(mean, latent_shape).float().contiguous(),
        var.clamp(min=0).float().contiguous(),
        int((var < 0).sum()),
    )


def statistics_to_diffusers(mean: Tensor | None, var: Tensor | None) -> tuple[Tensor, Tensor]:
    """``_latents_mean`` and ``_latents_std`` with which ``AutoencoderRAE`` normalises as this package does.

    Args:
        mean: [C, h, w], or None for latents as they are.
        var: likewise.

    Returns:
        Two tensors [C, h, w] float32; without statistics two of one number, with which it divides by 1
        (its own default of 1 makes it 1 + 1e-5).
    """
    if mean is None or var is None:
        return torch.zeros(1), torch.full((1,), 1 - DIFFUSERS_EPS)
    std = torch.sqrt(var.double() + VARIANCE_EPS) - DIFFUSERS_EPS
    return mean.float(), std.float()


def _architecture(encoder: EncoderConfig) -> dict[str, Any]:
    fields = encoder.model_dump(exclude={"mlp_ratio", "width", "image_size", "patch_size", "depth"})
    return {"mlp_width": encoder.mlp_width, **fields}


def _with_class(fields: Mapping[str, Any]) -> dict[str, Any]:
    return {"_class_name": CLASS_NAME, **fields}
