"""State dicts of other libraries in this package's names; pure functions, nothing is read or written.

Both mappings are strict: a tensor that is missing or not known is an error that names it. What this
package has no use for is dropped by name: DINOv2's mask token and final LayerNorm (LN_bb has no
affine part), and the decoder's sin-cos table, which follows from the configuration.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from model.errors import CheckpointError

# Hub files of DINOv2 keep the attention names of transformers 4; version 5 renames them as it loads.
_TRANSFORMERS_4_NAMES = {
    "attention.attention.query": "attention.q_proj",
    "attention.attention.key": "attention.k_proj",
    "attention.attention.value": "attention.v_proj",
    "attention.output.dense": "attention.o_proj",
}


@dataclass(frozen=True)
class _Names:
    """Foreign name of every tensor of ours; a tuple is concatenated along the first dimension."""

    block_prefix: str
    outside: dict[str, str]
    in_block: dict[str, str | tuple[str, ...]]
    dropped: frozenset[str]


def _affine(pairs: dict[str, str]) -> dict[str, str]:
    return {
        f"{ours}.{kind}": f"{theirs}.{kind}" for ours, theirs in pairs.items() for kind in ("weight", "bias")
    }


def _fused(ours: str, *theirs: str) -> dict[str, str | tuple[str, ...]]:
    return {f"{ours}.{kind}": tuple(f"{name}.{kind}" for name in theirs) for kind in ("weight", "bias")}


_DINOV2 = _Names(
    block_prefix="encoder.layer.",
    outside={
        "class_token": "embeddings.cls_token",
        "register_tokens": "embeddings.register_tokens",
        "positions": "embeddings.position_embeddings",
        **_affine({"patch_embed": "embeddings.patch_embeddings.projection"}),
    },
    in_block={
        **_affine(
            {
                "norm_attention": "norm1",
                "attention.out": "attention.o_proj",
                "norm_mlp": "norm2",
                "mlp.up": "mlp.fc1",
                "mlp.down": "mlp.fc2",
            }
        ),
        **_fused("attention.qkv", "attention.q_proj", "attention.k_proj", "attention.v_proj"),
        "scale_attention.gain": "layer_scale1.lambda1",
        "scale_mlp.gain": "layer_scale2.lambda1",
    },
    dropped=frozenset({"embeddings.mask_token", "layernorm.weight", "layernorm.bias"}),
)

_RAE_DECODER = _Names(
    block_prefix="decoder_layers.",
    outside={
        "class_token": "trainable_cls_token",
        **_affine({"embed": "decoder_embed", "norm": "decoder_norm", "predict": "decoder_pred"}),
    },
    in_block={
        **_affine(
            {
                "norm_attention": "layernorm_before",
                "attention.out": "attention.to_out.0",
                "norm_mlp": "layernorm_after",
                "mlp.up": "intermediate.dense",
                "mlp.down": "output.dense",
            }
        ),
        **_fused("attention.qkv", "attention.to_q", "attention.to_k", "attention.to_v"),
    },
    dropped=frozenset({"decoder_pos_embed"}),
)


def encoder_state_from_transformers(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights for `model.encoder.Encoder` from a ``Dinov2WithRegistersModel``.

    Args:
        state_dict: its tensors, by the names of transformers 5 or of the files on the hub; the final
            LayerNorm may be absent, as in RAE.

    Returns:
        A state dict that ``Encoder.load_state_dict`` takes strictly, of the same dtypes.

    Raises:
        CheckpointError: a tensor is missing, or not known (a SwiGLU MLP for instance); names it.
    """
    return _translate({_modern_name(name): tensor for name, tensor in state_dict.items()}, _DINOV2)


def decoder_state_from_diffusers(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights for `model.decoder.Decoder` from the ``decoder`` of diffusers' ``AutoencoderRAE``.

    Args:
        state_dict: tensors of ``AutoencoderRAE.decoder``, without the ``decoder.`` prefix.

    Returns:
        A state dict that ``Decoder.load_state_dict`` takes strictly, of the same dtypes.

    Raises:
        CheckpointError: a tensor is missing or not known; names it.
    """
    return _translate(state_dict, _RAE_DECODER)


def _modern_name(name: str) -> str:
    for old, new in _TRANSFORMERS_4_NAMES.items():
        name = name.replace(f".{old}.", f".{new}.")
    return name


def _translate(state_dict: Mapping[str, Tensor], names: _Names) -> dict[str, Tensor]:
    remaining = {name: tensor for name, tensor in state_dict.items() if name not in names.dropped}

    def take(name: str) -> Tensor:
        if name not in remaining:
            raise CheckpointError(f"tensor {name!r} is missing")
        return remaining.pop(name)

    def take_fused(parts: tuple[str, ...]) -> Tensor:
        tensors = [take(part) for part in parts]
        for part, tensor in zip(parts, tensors, strict=True):
            if tensor.shape != tensors[0].shape:
                found, wanted = list(tensor.shape), list(tensors[0].shape)
                raise CheckpointError(f"tensor {part!r} has shape {found}, where {parts[0]!r} has {wanted}")
        return torch.cat(tensors) if len(tensors) > 1 else tensors[0]

    translated = {ours: take(theirs) for ours, theirs in names.outside.items()}
    for block in range(_num_blocks(state_dict, names.block_prefix)):
        prefix = f"{names.block_prefix}{block}."
        for ours, theirs in names.in_block.items():
            sources = (theirs,) if isinstance(theirs, str) else theirs
            translated[f"blocks.{block}.{ours}"] = take_fused(tuple(prefix + source for source in sources))
    if remaining:
        raise CheckpointError(f"unexpected tensor {min(remaining)!r}")
    return translated


def _num_blocks(state_dict: Mapping[str, Tensor], prefix: str) -> int:
    numbers = [name.removeprefix(prefix).split(".")[0] for name in state_dict if name.startswith(prefix)]
    num_blocks = 1 + max((int(number) for number in numbers if number.isdecimal()), default=-1)
    if not num_blocks:
        raise CheckpointError(f"tensor '{prefix}0.*' is missing: no block was found")
    return num_blocks
