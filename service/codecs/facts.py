"""What requests have to know of the model. A `Tokenizer` tells it of itself; it may be in another process."""

from typing import Protocol

import torch

from model.checkpoints.tokenizers import CheckpointInfo
from model.config import TokenizerConfig


class ModelFacts(Protocol):
    """The attributes of `model.tokenizer.Tokenizer` that are not its weights."""

    @property
    def config(self) -> TokenizerConfig: ...
    @property
    def checkpoint(self) -> CheckpointInfo | None: ...
    @property
    def has_statistics(self) -> bool: ...
    @property
    def has_router(self) -> bool: ...
    @property
    def dtype(self) -> torch.dtype: ...
    @property
    def device(self) -> torch.device: ...
    @property
    def fusion_path(self) -> str: ...
