"""What goes from process to process is the same there."""

from pathlib import Path

import pytest
import torch

from model.tokenizer import Tokenizer
from service.engine.operations import RECONSTRUCT, BatchKey
from service.errors import DeviceMemoryError, QueueFullError, UnauthorizedError, from_fields, to_fields
from service.processes.fronts.messages import (
    facts_from_fields,
    facts_to_fields,
    key_from_fields,
    key_to_fields,
    settings_environment,
)
from service.settings import Settings


def test_settings_survive_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = Settings(
        api_keys="one-long-enough-key,another-such-key-here",
        api_keys_file=Path("/keys"),
        batch_buckets=(1, 4, 8),
        batch_size=8,
        cors_origins=("https://a.example", "https://b.example"),
        exact_images=True,
        hang_timeout_s=0.1,
        frontends=3,
    )
    for sent in (settings, Settings()):
        for name, value in settings_environment(sent).items():
            monkeypatch.setenv(name, value)
        assert Settings() == sent


def test_facts_of_a_model(tokenizer: Tokenizer) -> None:
    facts = facts_from_fields(facts_to_fields(tokenizer))
    for name in ("config", "checkpoint", "has_statistics", "has_router", "dtype", "device", "fusion_path"):
        assert getattr(facts, name) == getattr(tokenizer, name), name


def test_kinds_of_jobs() -> None:
    key = BatchKey(RECONSTRUCT, "base", True, torch.uint8)
    assert key_from_fields(key_to_fields(key)) == key


@pytest.mark.parametrize(
    "error",
    [
        QueueFullError("Full.", {"Retry-After": "7"}),
        DeviceMemoryError("None left."),
        UnauthorizedError("No."),
    ],
)
def test_errors(error: QueueFullError) -> None:
    received = from_fields(to_fields(error))
    assert type(received) is type(error)
    assert (received.detail, received.headers) == (error.detail, error.headers)
