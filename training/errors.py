"""Exceptions of the training package.

::

    TrainingError
    ├── RecipeError     a recipe file that cannot be read or asks for the impossible
    ├── DataError       no images, an unreadable folder or shard
    ├── LatentsError    a folder of latents of something else, a damaged one, or one that cannot be made
    ├── WeightsError    pretrained weights that a loss needs are absent
    ├── DivergenceError a loss that is no longer finite
    ├── WorkerError     a process that encodes ended again and again
    ├── RankError       another rank ended, or did not answer in time
    └── ClusterError    no Ray cluster, or machines that do not share what they must
"""


class TrainingError(Exception):
    """Root of every error that training raises for its users."""


class RecipeError(TrainingError, ValueError):
    """A recipe that cannot be read; the message names the file and the field."""


class DataError(TrainingError, ValueError):
    """Images that cannot be used; the message names the folder, shard or member."""


class LatentsError(TrainingError):
    """A folder of latents that cannot be used or made; the message names the folder or file."""


class WeightsError(TrainingError):
    """Pretrained weights that are not there; the message names them and the alternative."""


class DivergenceError(TrainingError):
    """A non-finite loss; the message names the step and the term."""


class WorkerError(TrainingError):
    """A process that ended several times at the same work; the message says where."""


class RankError(TrainingError):
    """Ranks that cannot go on together; the message says which one gave up, and why."""


class ClusterError(TrainingError):
    """A Ray cluster that cannot be used; the message names its address or its machine."""
