"""State dicts of other libraries in this package's names; pure functions, nothing is read or written.

All mappings are strict: a tensor that is missing or not known is an error that names it. What this
package has no use for is dropped by name: of encoders as `model.encoder_names` lists it, and the
decoder's sin-cos table, which follows from the configuration.
"""

from collections.abc import Mapping

from torch import Tensor

from model.encoder_configs import encoder_config_from_transformers, pixel_statistics_from_transformers
from model.encoder_names import encoder_state_from_transformers, encoder_state_to_transformers
from model.translation import TensorNames, affine, count_blocks, fused, translate

__all__ = [
    "decoder_state_from_diffusers",
    "encoder_config_from_transformers",
    "encoder_state_from_transformers",
    "encoder_state_to_transformers",
    "pixel_statistics_from_transformers",
]

_RAE_DECODER = TensorNames(
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
    dropped=frozenset({"decoder_pos_embed"}),
)


def decoder_state_from_diffusers(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights for `model.decoder.Decoder` from the ``decoder`` of diffusers' ``AutoencoderRAE``.

    Args:
        state_dict: tensors of ``AutoencoderRAE.decoder``, without the ``decoder.`` prefix.

    Returns:
        A state dict that ``Decoder.load_state_dict`` takes strictly, of the same dtypes.

    Raises:
        CheckpointError: a tensor is missing or not known; names it.
    """
    num_blocks = count_blocks(state_dict, _RAE_DECODER.block_prefix)
    return translate(state_dict, _RAE_DECODER, num_blocks)
