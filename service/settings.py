"""Settings of the service: one frozen object, filled from ``DRORAE_*`` variables once, at start.

Command-line flags are made from `Settings.model_fields`: each field carries its type, default,
bounds and a description that names the unit.
"""

import os
from collections.abc import Mapping
from typing import Annotated, Literal, Self

from pydantic import Field, StringConstraints, model_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from kernels.dispatch import FusionSetting

ENV_PREFIX = "DRORAE_"

NonEmptyText = Annotated[str, StringConstraints(min_length=1, strip_whitespace=True)]
DevicePattern = r"^(auto|cpu|cuda(:\d{1,3})?)$"


class Settings(BaseSettings):
    """Everything that can be set, with its bounds.

    Raises:
        pydantic.ValidationError: an unknown keyword, a value out of bounds, or two that contradict.
    """

    model_config = SettingsConfigDict(env_prefix=ENV_PREFIX, frozen=True, extra="forbid")

    checkpoint: NonEmptyText = Field(
        "mini", description="Checkpoint directory, or the name of a bundled one."
    )
    device: str = Field(
        "auto",
        pattern=DevicePattern,
        description="Where the model runs: auto (a GPU if any), cpu, cuda or cuda:N.",
    )
    dtype: Literal["float32", "bfloat16", "float16"] = Field(
        "float32", description="Type of the model's weights and activations."
    )
    fusion: FusionSetting = Field(
        "auto",
        description="What computes the fusion: auto (what suits device and model), triton (GPU kernels), "
        "folded (PyTorch, experts folded) or reference (PyTorch, the definition).",
    )
    host: NonEmptyText = Field("127.0.0.1", description="Address to listen on.")
    port: int = Field(
        8000, ge=0, le=65535, description="Port to listen on; 0 takes a free one and prints it."
    )
    log_level: Literal["debug", "info", "warning", "error"] = Field(
        "info", description="Least severe level that is logged."
    )
    max_body_bytes: int = Field(
        64 * 2**20, ge=1024, le=2**33, description="Largest request body, bytes; larger ones get 413."
    )
    max_image_pixels: int = Field(
        50_000_000,
        ge=1,
        le=10**9,
        description="Largest image, pixels, judged from its header before decoding; larger ones get 413.",
    )
    max_aspect_ratio: float = Field(
        20.0,
        ge=1,
        le=1000,
        description="Largest ratio of an image's long side to its short side; beyond it 422.",
    )
    max_items_per_request: int = Field(
        64, ge=1, le=4096, description="Most images or latents in one request; more get 413."
    )
    queue_limit_items: int = Field(
        256, ge=1, le=65536, description="Most items that wait for the model; beyond it requests get 429."
    )
    request_timeout_s: float = Field(
        60.0,
        gt=0,
        le=3600,
        description="Deadline of a request from its first byte to its answer, seconds; 504 after.",
    )
    batch_size: int = Field(8, ge=1, le=4096, description="Most items that go through the model at once.")
    num_io_threads: int = Field(
        4,
        ge=1,
        le=256,
        description="Threads that decode images and write answers, beside the model's own thread.",
    )
    drain_timeout_s: float = Field(
        30.0, ge=0, le=3600, description="How long a stopping service waits for requests in flight, seconds."
    )
    retry_after_s: int = Field(1, ge=1, le=3600, description="Retry-After of 429 and 503 answers, seconds.")

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.max_items_per_request > self.queue_limit_items:
            raise ValueError(
                f"max_items_per_request={self.max_items_per_request} exceeds "
                f"queue_limit_items={self.queue_limit_items}: such a request could never be queued"
            )
        return self


def unknown_variables(environment: Mapping[str, str] | None = None) -> list[str]:
    """``DRORAE_*`` variables that name no setting: most likely typing errors."""
    known = {f"{ENV_PREFIX}{name}".upper() for name in Settings.model_fields}
    names = os.environ if environment is None else environment
    return sorted(name for name in names if name.upper().startswith(ENV_PREFIX) and name.upper() not in known)
