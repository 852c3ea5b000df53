"""State dicts of other libraries in this package's names; pure functions, nothing is read or written.

All mappings are strict: a tensor that is missing or not known is an error that names it. What this
package has no use for is dropped by name, as `model.interop.transformers_weights` and
`model.interop.rae_decoder_weights` list it.
"""

from model.interop.rae_decoder_weights import (
    RAE_DECODERS,
    decoder_config_from_state,
    decoder_grid,
    decoder_latent_width,
    decoder_state_from_diffusers,
    decoder_state_to_diffusers,
)
from model.interop.transformers_config import (
    encoder_config_from_transformers,
    pixel_statistics_from_transformers,
)
from model.interop.transformers_weights import (
    TransformersRelease,
    encoder_state_from_transformers,
    encoder_state_to_transformers,
)

__all__ = [
    "RAE_DECODERS",
    "TransformersRelease",
    "decoder_config_from_state",
    "decoder_grid",
    "decoder_latent_width",
    "decoder_state_from_diffusers",
    "decoder_state_to_diffusers",
    "encoder_config_from_transformers",
    "encoder_state_from_transformers",
    "encoder_state_to_transformers",
    "pixel_statistics_from_transformers",
]
