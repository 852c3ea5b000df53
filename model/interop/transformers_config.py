"""Encoders by the ``config.json`` that transformers keeps beside their weights."""

from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import ValidationError

from model.config import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    SIGLIP_MEAN,
    SIGLIP_STD,
    EncoderConfig,
    MlpKind,
    PixelTriple,
)
from model.errors import CheckpointError

_ACTIVATIONS: dict[str, MlpKind] = {
    "gelu": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
}
# What a config.json that does not say means: transformers leaves defaults out of nested configurations.
_DEFAULTS: dict[str, dict[str, Any]] = {
    "dinov2": {"layer_norm_eps": 1e-6, "patch_size": 14, "hidden_act": "gelu"},
    "dinov2_with_registers": {"layer_norm_eps": 1e-6, "patch_size": 16, "hidden_act": "gelu"},
    "siglip_vision_model": {"layer_norm_eps": 1e-6, "hidden_act": "gelu_pytorch_tanh"},
    "siglip2_vision_model": {"layer_norm_eps": 1e-6, "hidden_act": "gelu_pytorch_tanh"},
    "vit_mae": {"layer_norm_eps": 1e-12, "hidden_act": "gelu"},
}
_COMMON_DEFAULTS: dict[str, Any] = {
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "intermediate_size": 3072,
    "mlp_ratio": 4,
    "image_size": 224,
    "patch_size": 16,
    "num_patches": 256,
    "num_register_tokens": 4,
}
_VISION_MODELS = {"siglip": "siglip_vision_model", "siglip2": "siglip2_vision_model"}


def encoder_config_from_transformers(
    config: Mapping[str, Any], image_size: int | None = None
) -> EncoderConfig:
    """The encoder that a ``config.json`` of transformers describes.

    Args:
        config: its contents; ``model_type`` is dinov2, dinov2_with_registers, vit_mae,
            siglip_vision_model or siglip2_vision_model, or siglip or siglip2 with a ``vision_config``.
        image_size: input side in pixels; by default the one that the position table was made for,
            which for DINOv2 is 518.

    Raises:
        CheckpointError: another model, or something that this encoder does not have; names the field.
    """
    model_type, fields = _vision_fields(config)
    patch_size = _side(fields, "patch_size")
    if model_type == "siglip2_vision_model":
        num_patches = _integer(fields, "num_patches")
        position_grid = round(num_patches**0.5)
        if position_grid**2 != num_patches:
            raise CheckpointError(f"field 'num_patches' is {num_patches}, which is no square")
    else:
        position_grid = _side(fields, "image_size") // patch_size
    values = {
        "width": _integer(fields, "hidden_size"),
        "depth": _integer(fields, "num_hidden_layers"),
        "num_heads": _integer(fields, "num_attention_heads"),
        "patch_size": patch_size,
        "image_size": position_grid * patch_size if image_size is None else image_size,
        "position_grid": position_grid,
        "layer_norm_eps": fields["layer_norm_eps"],
        **_family_values(model_type, fields),
    }
    try:
        return EncoderConfig.model_validate(values)
    except ValidationError as exc:
        error = exc.errors()[0]
        field = ".".join(str(step) for step in error["loc"])
        where = f"encoder field {field!r}: " if field else ""
        raise CheckpointError(f"{where}{error['msg'].removeprefix('Value error, ')}") from exc


def pixel_statistics_from_transformers(config: Mapping[str, Any]) -> tuple[PixelTriple, PixelTriple]:
    """Mean and deviation of the pixels that a family was trained with, where no file says otherwise.

    Raises:
        CheckpointError: as `encoder_config_from_transformers`, for another model.
    """
    model_type, _ = _vision_fields(config)
    if model_type.startswith("siglip"):
        return SIGLIP_MEAN, SIGLIP_STD
    return IMAGENET_MEAN, IMAGENET_STD


def _vision_fields(config: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """Model type of the vision encoder, and its fields with transformers' defaults."""
    model_type = str(config.get("model_type"))
    if model_type in _VISION_MODELS:
        vision = config.get("vision_config")
        if not isinstance(vision, Mapping):
            raise CheckpointError(f"field 'vision_config' of a {model_type} model is missing")
        model_type, config = _VISION_MODELS[model_type], vision
    if model_type not in _DEFAULTS:
        known = ", ".join([*_DEFAULTS, *_VISION_MODELS])
        raise CheckpointError(f"field 'model_type' is {model_type!r}, no encoder known here: {known}")
    given = {name: value for name, value in config.items() if value is not None}
    fields = {**_COMMON_DEFAULTS, **_DEFAULTS[model_type], **given}
    for name, wanted in (("num_channels", 3), ("qkv_bias", True)):
        if fields.get(name, wanted) != wanted:
            raise CheckpointError(f"field {name!r} is {fields[name]!r}, and only {wanted!r} is built here")
    return model_type, fields


def _family_values(model_type: str, fields: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of `EncoderConfig` that differ from family to family."""
    activation = fields["hidden_act"]
    if not isinstance(activation, str) or activation not in _ACTIVATIONS:
        known = ", ".join(_ACTIVATIONS)
        raise CheckpointError(f"field 'hidden_act' is {activation!r}, expected one of {known}")
    if model_type in ("dinov2", "dinov2_with_registers"):
        has_registers = model_type == "dinov2_with_registers"
        return {
            "mlp": "swiglu" if fields.get("use_swiglu_ffn") else _ACTIVATIONS[activation],
            "mlp_ratio": fields["mlp_ratio"],
            "num_registers": fields["num_register_tokens"] if has_registers else 0,
            "position_resize": "bicubic_antialias" if has_registers else "bicubic",
        }
    is_mae, is_naflex = model_type == "vit_mae", model_type == "siglip2_vision_model"
    return {
        "mlp": _ACTIVATIONS[activation],
        "mlp_ratio": _integer(fields, "intermediate_size") / _integer(fields, "hidden_size"),
        "layer_scale": False,
        "class_token": is_mae,
        "num_registers": 0,
        "positions": "sincos" if is_mae else "learned",
        "position_resize": "bilinear_antialias" if is_naflex else "bicubic",
    }


def _integer(fields: Mapping[str, Any], name: str) -> int:
    value = fields[name]
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise CheckpointError(f"field {name!r} is {value!r}, expected a whole number above 0")
    return value


def _side(fields: Mapping[str, Any], name: str) -> int:
    """A side given as a number, or as two equal ones."""
    value = fields[name]
    if isinstance(value, Sequence) and len(value) == 2 and value[0] == value[1]:
        return _integer({name: value[0]}, name)
    return _integer(fields, name)
