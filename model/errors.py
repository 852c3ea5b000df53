"""Exceptions of the model package.

::

    ModelError
    ├── ConfigError       a configuration that cannot be built
    ├── CheckpointError   a checkpoint that is missing, corrupt, foreign or of another version
    ├── ImageError        images of the wrong shape or dtype
    │   └── PictureCostError   a file that would cost too much to decode
    ├── LatentError       latents of the wrong shape, dtype or value
    ├── SamplingError     samples that a generator cannot make
    └── FusionError       a fusion implementation that cannot run here
"""


class ModelError(Exception):
    """Root of every error that the model package raises for its users."""


class ConfigError(ModelError, ValueError):
    """A configuration that names something impossible; the message names the field."""


class CheckpointError(ModelError, ValueError):
    """A checkpoint that cannot be loaded; the message names the file and, where known, the tensor."""


class ImageError(ModelError, ValueError):
    """Images that the tokenizer cannot take."""


class PictureCostError(ImageError):
    """An image file that would cost too much to decode."""


class LatentError(ModelError, ValueError):
    """Latents that the tokenizer cannot take, or a latent option that it cannot honour."""


class SamplingError(ModelError, ValueError):
    """Samples that a generator cannot make: no such class, no such scale, a guide of another shape."""


class FusionError(ModelError, ValueError):
    """An implementation of the fusion that was asked for and cannot run; the message says why."""
