"""What fronts and engine say to each other: JSON objects, whose ``do`` says what for.

A front says ``ready`` once, ``submit`` and ``cancel`` of its jobs, and ``page`` where it wants the metrics.
The engine says ``model`` when it is ready, ``done`` of each submitted job, the ``page``, and ``failed``
and ``stop`` at the end.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from model.checkpoints.tokenizers import CheckpointInfo
from model.config import TokenizerConfig
from model.images.tensors import dtype_name
from model.tokenizer import Tokenizer
from service.engine.devices import share_cpus
from service.engine.operations import OPERATIONS, BatchKey
from service.processes.children import frame
from service.settings import ENV_PREFIX, Settings

Message = Mapping[str, Any]

_OPERATIONS = {operation.name: operation for operation in OPERATIONS}


def pack(do: str, **fields: Any) -> bytes:
    """A message as it is sent."""
    return frame(json.dumps({"do": do, **fields}).encode())


@dataclass(frozen=True)
class Facts:
    """What a front knows of the model; see `service.codecs.facts.ModelFacts`."""

    config: TokenizerConfig
    checkpoint: CheckpointInfo | None
    has_statistics: bool
    has_router: bool
    dtype: torch.dtype
    device: torch.device
    fusion_path: str


def facts_to_fields(tokenizer: Tokenizer) -> dict[str, Any]:
    """A tokenizer's facts as JSON."""
    checkpoint = tokenizer.checkpoint
    return {
        "config": tokenizer.config.model_dump(mode="json"),
        "checkpoint": checkpoint and {**asdict(checkpoint), "path": str(checkpoint.path)},
        "has_statistics": tokenizer.has_statistics,
        "has_router": tokenizer.has_router,
        "dtype": dtype_name(tokenizer.dtype),
        "device": str(tokenizer.device),
        "fusion_path": tokenizer.fusion_path,
    }


def facts_from_fields(fields: Message) -> Facts:
    """The facts that `facts_to_fields` made JSON of."""
    checkpoint = fields["checkpoint"]
    return Facts(
        **{
            **fields,
            "config": TokenizerConfig.model_validate(fields["config"]),
            "checkpoint": checkpoint and CheckpointInfo(**{**checkpoint, "path": Path(checkpoint["path"])}),
            "dtype": getattr(torch, fields["dtype"]),
            "device": torch.device(fields["device"]),
        }
    )


def key_to_fields(key: BatchKey) -> dict[str, Any]:
    """The kind of a job as JSON."""
    return {
        "operation": key.operation.name,
        "latent": key.latent,
        "normalize": key.normalize,
        "dtype": dtype_name(key.dtype),
    }


def key_from_fields(fields: Message) -> BatchKey:
    """The kind that `key_to_fields` made JSON of."""
    operation, dtype = _OPERATIONS[fields["operation"]], getattr(torch, fields["dtype"])
    return BatchKey(operation, fields["latent"], fields["normalize"], dtype)


def settings_of_front(settings: Settings) -> Settings:
    """The settings of each front: its share of what is counted by process."""
    shared = {
        "max_connections": settings.max_connections,
        "num_decoders": share_cpus(settings).num_decoders,
    }
    number = settings.frontends
    return settings.model_copy(update={name: math.ceil(all_ / number) for name, all_ in shared.items()})


def settings_environment(settings: Settings) -> dict[str, str]:
    """All settings as the variables that give them to another process."""
    fields = {**settings.model_dump(mode="json"), "api_keys": settings.api_keys.get_secret_value()}
    return {ENV_PREFIX + name.upper(): _as_text(value) for name, value in fields.items()}


def _as_text(value: object) -> str:
    if isinstance(value, list):
        return ",".join(map(str, value))
    return "" if value is None else str(value)
