"""Weights of RAE's decoder by this package's names, and back.

Two spellings of the same tensors: diffusers' ``AutoencoderRAE.decoder``, and RAE's own ``model.pt``, which
names attention as transformers 4 does. Dropped by name: the table of fixed sin-cos positions, which follows
from the configuration; `decoder_grid` checks that it does.
"""

from collections.abc import Mapping

import torch
from pydantic import ValidationError
from torch import Tensor

from model.config import DecoderConfig, TokenizerConfig
from model.errors import CheckpointError
from model.interop.renaming import TensorNames, affine, count_blocks, fused, translate, translate_back
from model.networks.decoder import Decoder
from model.networks.vit import sincos_positions

POSITIONS = "decoder_pos_embed"
# RAE's published decoders; the number of heads is not to be seen in any tensor.
RAE_DECODERS = {
    "b": DecoderConfig(width=768, depth=12, num_heads=12, mlp_width=3072),
    "l": DecoderConfig(width=1024, depth=24, num_heads=16, mlp_width=4096),
    "xl": DecoderConfig(),
}
_NAMES = TensorNames(
    block_prefix="decoder_layers.",
    outside={
        "class_token": "trainable_cls_token",
        **affine({"embed": "decoder_embed", "norm": "decoder_norm", "predict": "decoder_pred"}),
    },
    in_block={
        **affine(
            {
                "norm_attention": "layernorm_before",
                "attention.out": "attention.to_out.0",
                "norm_mlp": "layernorm_after",
                "mlp.up": "intermediate.dense",
                "mlp.down": "output.dense",
            }
        ),
        **fused("attention.qkv", "attention.to_q", "attention.to_k", "attention.to_v"),
    },
    dropped=frozenset({POSITIONS}),
)
_RAE_FILE_PARTS = {
    ".attention.to_q.": ".attention.attention.query.",
    ".attention.to_k.": ".attention.attention.key.",
    ".attention.to_v.": ".attention.attention.value.",
    ".attention.to_out.0.": ".attention.output.dense.",
}


def decoder_state_from_diffusers(
    state_dict: Mapping[str, Tensor], config: TokenizerConfig | None = None
) -> dict[str, Tensor]:
    """Weights for `model.networks.decoder.Decoder` from a decoder of diffusers or of RAE.

    Args:
        state_dict: tensors of ``AutoencoderRAE.decoder``, without the ``decoder.`` prefix, or of RAE's
            ``model.pt``.
        config: the tokenizer that is wanted; by default no shape is checked.

    Returns:
        A state dict that ``Decoder.load_state_dict`` takes strictly, of the same dtypes.

    Raises:
        CheckpointError: a tensor is missing, not known or of another shape; names it.
    """
    is_rae_file = _is_rae_file(state_dict)
    modern = {_modern_name(name): tensor for name, tensor in state_dict.items()}
    shapes = None
    num_blocks = count_blocks(state_dict, _NAMES.block_prefix)
    if config is not None:
        with torch.device("meta"):
            shapes = {name: tensor.shape for name, tensor in Decoder(config).state_dict().items()}
        num_blocks = config.decoder.depth
    return translate(modern, _NAMES, num_blocks, _rae_name if is_rae_file else str, shapes)


def decoder_state_to_diffusers(state_dict: Mapping[str, Tensor], config: DecoderConfig) -> dict[str, Tensor]:
    """Tensors of ``AutoencoderRAE.decoder``, without the ``decoder.`` prefix, from those of `Decoder`.

    Args:
        state_dict: a complete state dict of ``Decoder``.
        config: the decoder.
    """
    return translate_back(state_dict, _NAMES, config.depth)


def decoder_config_from_state(
    state_dict: Mapping[str, Tensor], num_heads: int | None = None
) -> DecoderConfig:
    """The decoder that these tensors are of; everything but its heads shows in their shapes.

    Args:
        state_dict: as for `decoder_state_from_diffusers`.
        num_heads: attention heads; by default those of RAE's decoder of this width.

    Raises:
        CheckpointError: a tensor is missing or no matrix, the output is no square patch of three channels,
            or the width is none of RAE's and the heads are not given.
    """
    width = _matrix(state_dict, "decoder_embed.weight")[0]
    mlp_width = _matrix(state_dict, f"{_NAMES.block_prefix}0.intermediate.dense.weight")[0]
    num_outputs = _matrix(state_dict, "decoder_pred.weight")[0]
    patch_size = round((num_outputs / 3) ** 0.5)
    if 3 * patch_size**2 != num_outputs:
        raise CheckpointError(
            f"tensor 'decoder_pred.weight' gives {num_outputs} numbers a token, no square patch of RGB pixels"
        )
    heads_by_width = {decoder.width: decoder.num_heads for decoder in RAE_DECODERS.values()}
    if num_heads is None and width not in heads_by_width:
        raise CheckpointError(
            f"the decoder's width {width} is none of RAE's ({', '.join(map(str, heads_by_width))}), so its "
            f"number of attention heads must be given"
        )
    try:
        return DecoderConfig(
            width=width,
            depth=count_blocks(state_dict, _NAMES.block_prefix),
            num_heads=num_heads or heads_by_width[width],
            mlp_width=mlp_width,
            patch_size=patch_size,
        )
    except ValidationError as exc:
        raise CheckpointError(f"not a decoder that can be built: {exc.errors()[0]['msg']}") from exc


def decoder_latent_width(state_dict: Mapping[str, Tensor]) -> int:
    """Width C of the latents that a decoder takes.

    Raises:
        CheckpointError: ``decoder_embed.weight`` is missing or no matrix.
    """
    return _matrix(state_dict, "decoder_embed.weight")[1]


def decoder_grid(state_dict: Mapping[str, Tensor], span: int | None = None) -> int | None:
    """Side of the latent grid that a decoder's stored positions are for, or None where none are stored.

    Args:
        state_dict: as for `decoder_state_from_diffusers`.
        span: as for `model.networks.vit.sincos_positions`.

    Raises:
        CheckpointError: the table is not the fixed sin-cos table of a square grid.
    """
    table = state_dict.get(POSITIONS)
    if table is None:
        return None
    grid = round((table.shape[1] - 1) ** 0.5) if table.ndim == 3 and table.shape[1] > 1 else 0
    wanted = _matrix(state_dict, "decoder_embed.weight")[0]
    if list(table.shape) != [1, 1 + grid**2, wanted] or grid < 1:
        raise CheckpointError(
            f"tensor {POSITIONS!r} has shape {list(table.shape)}, no positions of a class token and a square "
            f"grid in width {wanted}"
        )
    difference = (table.float() - sincos_positions(wanted, grid, span)).abs().max().item()
    tolerance = 1e-4 if table.dtype in (torch.float32, torch.float64) else 1e-2  # rounding of half precision
    if not difference <= tolerance:  # NaN too
        raise CheckpointError(
            f"tensor {POSITIONS!r} differs from the fixed sin-cos positions by up to {difference:.3g}: a "
            f"decoder with positions of its own cannot be imported"
        )
    return grid


def _matrix(state_dict: Mapping[str, Tensor], name: str) -> tuple[int, int]:
    if name not in state_dict:
        raise CheckpointError(f"tensor {name!r} is missing")
    shape = tuple(state_dict[name].shape)
    if len(shape) != 2:
        raise CheckpointError(f"tensor {name!r} has shape {list(shape)}, expected a matrix")
    return shape[0], shape[1]


def _is_rae_file(state_dict: Mapping[str, Tensor]) -> bool:
    return any(part in name for name in state_dict for part in _RAE_FILE_PARTS.values())


def _modern_name(name: str) -> str:
    for modern, old in _RAE_FILE_PARTS.items():
        name = name.replace(old, modern)
    return name


def _rae_name(name: str) -> str:
    for modern, old in _RAE_FILE_PARTS.items():
        name = name.replace(modern, old)
    return name
