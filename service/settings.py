"""Settings of the service: one frozen object, filled from ``DRORAE_*`` variables once, at start.

Command-line flags are made from `Settings.model_fields`: each field carries its type, default,
bounds and a description that names the unit.
"""

import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field, PositiveInt, SecretStr, StringConstraints, field_validator, model_validator
from pydantic_settings import (
    BaseSettings,
    EnvSettingsSource,
    NoDecode,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
)

from kernels.dispatch import FusionSetting
from model.spelling import suggest

ENV_PREFIX = "DRORAE_"
# Variables of the same prefix with other readers: training recipes, the command line, files under deploy/.
OTHER_VARIABLES = frozenset(
    {
        "DRORAE_API_KEY",
        "DRORAE_DATA",
        "DRORAE_IMAGENET",
        "DRORAE_BACKEND",
        "DRORAE_BIND",
        "DRORAE_DNS",
        "DRORAE_KEYS_FILE",
        "DRORAE_METRICS_BIND",
        "DRORAE_PUBLISH",
        "DRORAE_REPLICAS",
        "DRORAE_SCRAPE_KEY_FILE",
    }
)
# What Kubernetes sets in every pod for a Service whose name begins with drorae; Docker's links are alike.
SERVICE_LINK = re.compile(
    r"DRORAE(_\w+)?_(SERVICE_HOST|SERVICE_PORT(_\w+)?|PORT_\d+_(TCP|UDP|SCTP)(_(PROTO|PORT|ADDR))?)"
)
SERVICE_LINK_ADDRESS = re.compile(r"(tcp|udp|sctp)://\S+")  # the value of DRORAE_PORT then

NonEmptyText = Annotated[str, StringConstraints(min_length=1, strip_whitespace=True)]


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
        pattern=r"^(auto|cpu|cuda(:\d{1,3})?)$",
        description="Where the model runs: auto (every visible GPU, else the CPU), cpu, cuda (every visible "
        "GPU) or cuda:N.",
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto",
        description="Type of the model's weights and activations: auto (bfloat16 where every GPU has compute "
        "capability 8.0 or more, else float32) or one of the others.",
    )
    fusion: FusionSetting = Field(
        "auto",
        description="What computes the fusion: auto (what suits device and model), triton (GPU kernels), "
        "triton_fp8 (norms in FP8), folded (PyTorch, experts folded) or reference (PyTorch, the definition).",
    )
    compile_blocks: bool = Field(
        False, description="Compile the model's blocks (torch.compile) before a GPU captures its graphs."
    )
    cpu_workers: int = Field(
        0,
        ge=0,
        le=256,
        description="Batches that a CPU computes side by side; 0 takes one per core that is left by the "
        "decoders, at most 4. On GPUs there is one engine per device.",
    )
    cpu_threads: int = Field(
        0,
        ge=0,
        le=1024,
        description="Cores that a CPU's workers share out among them; 0 takes those of this process that its "
        "decoders leave.",
    )
    batch_size: int = Field(
        0,
        ge=0,
        le=4096,
        description="Most items that go through the model at once; 0 takes 64 on GPUs and 8 on a CPU.",
    )
    batch_buckets: Annotated[tuple[PositiveInt, ...], NoDecode] = Field(
        (),
        description="Sizes that batches are padded to, ascending and separated by commas, the last of them "
        "batch_size, which may then be 0; empty takes 1, 2, 3, 4, 6, 8, 12, 16, ... up to it.",
    )
    host: NonEmptyText = Field("127.0.0.1", description="Address to listen on.")
    port: int = Field(
        8000, ge=0, le=65535, description="Port to listen on; 0 takes a free one and prints it."
    )
    frontends: int = Field(
        1,
        ge=1,
        le=64,
        description="Processes that accept connections and answer requests, on one port and in front of one "
        "engine, with a share of max_connections and num_decoders each; 1 leaves it to the engine's process.",
    )
    max_connections: int = Field(
        2048,
        ge=1,
        le=2**20,
        description="Most open connections; a further one takes the longest idle one's place, or gets 503.",
    )
    keep_alive_timeout_s: int = Field(
        75, ge=1, le=3600, description="How long an idle connection stays open, seconds."
    )
    header_timeout_s: float = Field(
        10.0, gt=0, le=3600, description="How long a client may take to send a request's headers, seconds."
    )
    body_timeout_s: float = Field(
        10.0, gt=0, le=3600, description="How long a request's body may pause, seconds; 408 after."
    )
    body_bytes_per_s: int = Field(
        4096,
        ge=1,
        le=2**30,
        description="Least rate of a request's body, bytes a second; 408 once it is body_timeout_s behind.",
    )
    answer_timeout_s: float = Field(
        20.0,
        gt=0,
        le=3600,
        description="How long a client may leave an answer unread, seconds; its connection is closed after.",
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
    max_request_pixels: int = Field(
        256_000_000,
        ge=1,
        le=10**11,
        description="Most pixels of all image files of a request, judged as those of one; more get 413.",
    )
    max_aspect_ratio: float = Field(
        20.0,
        ge=1,
        le=1000,
        description="Largest ratio of an image's long side to its short side; beyond it 422.",
    )
    max_frames: int = Field(
        1000,
        ge=1,
        le=10**6,
        description="Most frames of an animation or pages of a TIFF, of which the first is taken; "
        "more get 413.",
    )
    exact_images: bool = Field(
        False,
        description="Decode and resize image files bit by bit as training does, also where a request does "
        "not ask for it. Otherwise large JPEG files are decoded at a fraction of their size, and all are "
        "resized by faster code: some 55 dB from the exact pixels.",
    )
    png_compression: Literal["fast", "small"] = Field(
        "fast",
        description="How PNG answers are compressed: small takes four times as long, and is no smaller for "
        "most photos.",
    )
    max_items_per_request: int = Field(
        64, ge=1, le=4096, description="Most images or latents in one request; more get 413."
    )
    queue_limit_items: int = Field(
        256,
        ge=1,
        le=65536,
        description="Most items that are accepted and not yet answered; beyond it requests get 429.",
    )
    queue_limit_bytes: int = Field(
        512 * 2**20,
        ge=1024,
        le=2**40,
        description="Most bytes that requests hold: bodies, tensors and answers; beyond it they get 429.",
    )
    queue_limit_pixels: int = Field(
        2_000_000_000,
        ge=1,
        le=10**12,
        description="Most pixels of image files that wait for their decoding; beyond it requests get 429.",
    )
    request_timeout_s: float = Field(
        60.0,
        gt=0,
        le=3600,
        description="Deadline of a request from its first byte to its answer, seconds, where its "
        "X-Request-Timeout header names none; 504 after.",
    )
    max_request_timeout_s: float = Field(
        300.0, gt=0, le=3600, description="Longest deadline that X-Request-Timeout can ask for, seconds."
    )
    num_io_threads: int = Field(
        0,
        ge=0,
        le=256,
        description="Threads that read tensors and write answers, beside the model's; 0 takes one a core.",
    )
    num_decoders: int = Field(
        0,
        ge=0,
        le=256,
        description="Processes that decode image files; 0 takes a quarter of the CPUs where the model runs "
        "on them too, else all but one per GPU, at most 32.",
    )
    drain_timeout_s: float = Field(
        30.0,
        ge=0,
        le=3600,
        description="How long a stopping service works on what it accepted, seconds; the rest gets 503.",
    )
    hang_timeout_s: float = Field(
        7.0,
        gt=0,
        le=3600,
        description="How long one batch may take, seconds. After it the engine counts as hung, and the "
        "service answers 503 and exits with status 3. A decoder without progress for so long is replaced. "
        "Batch sizes that take more than half of it when the service starts are left out.",
    )
    start_timeout_s: float = Field(
        300.0,
        gt=0,
        le=86400,
        description="How long loading the model, and then warming it, may each get nowhere, seconds, before "
        "the service exits with status 3. Time for which other processes have the CPUs does not count.",
    )
    retry_after_s: int = Field(
        1,
        ge=1,
        le=3600,
        description="Retry-After of 503 answers, seconds, and the least of 429 answers, whose own follows "
        "from the measured rate.",
    )
    api_keys: SecretStr = Field(
        SecretStr(""),
        description="Keys of which clients send one as a bearer token, separated by commas; "
        "none leave the service open.",
    )
    api_keys_file: Path | None = Field(
        None,
        description="File of further keys, one a line, # begins a comment; read again when it changes.",
    )
    page: Literal["on", "off"] = Field(
        "on",
        description="Whether / shows browsers the page that tries the service on a photo. Off, they get the "
        "lines for curl.",
    )
    cors_origins: Annotated[tuple[str, ...], NoDecode] = Field(
        (),
        description="Origins whose web pages may call the service, separated by commas, or *; "
        "none by default.",
    )
    log_level: Literal["debug", "info", "warning", "error"] = Field(
        "info", description="Least severe level that is logged."
    )
    log_format: Literal["text", "json"] = Field(
        "text", description="Form of the log on stderr: text, or one JSON object a line."
    )
    otlp_endpoint: str = Field(
        "",
        pattern=r"^$|^https?://",
        description="OpenTelemetry collector that traces are sent to (OTLP over HTTP), such as "
        "http://collector:4318; none where empty. Needs the extra drorae[otel].",
    )

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Empty variables are as good as unset, and links of Kubernetes are not ours."""
        assert isinstance(env_settings, EnvSettingsSource)
        env_settings.env_vars = {
            name: value
            for name, value in env_settings.env_vars.items()
            if value and value.strip() and not _is_service_link(name, value)
        }
        return init_settings, env_settings

    @field_validator("batch_buckets", "cors_origins", mode="before")
    @classmethod
    def _split(cls, value: object) -> object:
        if isinstance(value, str):
            return tuple(part.strip() for part in value.split(",") if part.strip())
        return value

    @field_validator("api_keys_file", mode="before")
    @classmethod
    def _no_path(cls, value: object) -> object:
        return None if value == "" else value

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.max_items_per_request > self.queue_limit_items:
            raise ValueError(
                f"max_items_per_request={self.max_items_per_request} exceeds "
                f"queue_limit_items={self.queue_limit_items}: such a request could never be queued"
            )
        if self.max_body_bytes > self.queue_limit_bytes:
            raise ValueError(
                f"max_body_bytes={self.max_body_bytes} exceeds queue_limit_bytes={self.queue_limit_bytes}: "
                "such a request could never be accepted"
            )
        if self.max_image_pixels > self.max_request_pixels:
            raise ValueError(
                f"max_image_pixels={self.max_image_pixels} exceeds "
                f"max_request_pixels={self.max_request_pixels}: such an image could never be accepted"
            )
        if self.max_request_pixels > self.queue_limit_pixels:
            raise ValueError(
                f"max_request_pixels={self.max_request_pixels} exceeds "
                f"queue_limit_pixels={self.queue_limit_pixels}: such a request could never be accepted"
            )
        if self.request_timeout_s > self.max_request_timeout_s:
            raise ValueError(
                f"request_timeout_s={self.request_timeout_s:g} exceeds "
                f"max_request_timeout_s={self.max_request_timeout_s:g}, the longest deadline there is"
            )
        buckets = self.batch_buckets
        if buckets and (list(buckets) != sorted(set(buckets)) or self.batch_size not in (0, buckets[-1])):
            raise ValueError(
                f"batch_buckets={','.join(map(str, buckets))} must ascend and end in "
                f"batch_size={self.batch_size}"
            )
        return self

    @property
    def buckets(self) -> tuple[int, ...]:
        """Sizes that batches are padded to, ascending. The batch size must not be left to the device."""
        return self.batch_buckets or default_buckets(self.batch_size)


def default_buckets(batch_size: int) -> tuple[int, ...]:
    """1, 2, 3, 4, 6, 8, 12, 16, ... up to ``batch_size``: at most a third of a batch is padding."""
    powers = [2**exponent for exponent in range(batch_size.bit_length())]
    steps = {size for power in powers for size in (power, power * 3 // 2)}
    return tuple(sorted({size for size in steps if size < batch_size} | {batch_size}))


def environment_warnings(environment: Mapping[str, str] | None = None) -> Iterator[str]:
    """Sentences about ``DRORAE_*`` variables that are ignored: typing errors, and links of Kubernetes."""
    names = os.environ if environment is None else environment
    known = [f"{ENV_PREFIX}{name}".upper() for name in Settings.model_fields]
    for name in unknown_variables(names):
        nearest = suggest(name.upper(), {*known, *OTHER_VARIABLES})
        yield f"the environment variable {name} names no setting and is ignored{nearest}"
    links = sorted(name for name, value in names.items() if _is_service_link(name, value))
    if links:
        yield (
            f"ignored {', '.join(links)}: Kubernetes sets them for a Service of that name, they are no "
            "settings; enableServiceLinks: false in the pod's spec keeps them out"
        )


def unknown_variables(environment: Mapping[str, str]) -> list[str]:
    """``DRORAE_*`` variables that nothing reads: most likely typing errors."""
    known = {f"{ENV_PREFIX}{name}".upper() for name in Settings.model_fields} | OTHER_VARIABLES
    return sorted(
        name
        for name, value in environment.items()
        if name.upper().startswith(ENV_PREFIX)
        and name.upper() not in known
        and not _is_service_link(name, value)
    )


def _is_service_link(name: str, value: str) -> bool:
    """Whether Kubernetes set a variable; ``DRORAE_PORT`` and its like are told by their value."""
    name = name.upper()
    if SERVICE_LINK.fullmatch(name):
        return True
    is_port = name.startswith(ENV_PREFIX) and name.endswith("_PORT")
    return is_port and SERVICE_LINK_ADDRESS.fullmatch(value) is not None
