"""What the settings leave to the devices: type of weights, batch size, and the reasons."""

from typing import Any

import pytest
import torch

from cli.options import EXACT
from service.engine import devices
from service.engine.devices import choose
from service.settings import Settings

AMPERE, HOPPER, TURING = (8, 0), (9, 0), (7, 5)


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """Compute capabilities of the GPUs that PyTorch sees; a test appends them."""
    capabilities: list[tuple[int, int]] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: bool(capabilities))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(capabilities))
    monkeypatch.setattr(
        torch.cuda, "get_device_capability", lambda name: capabilities[int(name.removeprefix("cuda:"))]
    )
    return capabilities


@pytest.mark.parametrize(
    ("capabilities", "device", "dtype", "batch_size"),
    [
        ([], "auto", "float32", 8),
        ([HOPPER], "auto", "bfloat16", 64),
        ([AMPERE, HOPPER], "cuda", "bfloat16", 64),
        ([HOPPER, TURING], "cuda", "float32", 64),
        ([HOPPER, TURING], "cuda:0", "bfloat16", 64),
        ([HOPPER, TURING], "cuda:1", "float32", 64),
        ([HOPPER], "cpu", "float32", 8),
    ],
)
def test_what_the_settings_leave_open_follows_the_devices(
    gpus: list[tuple[int, int]], capabilities: Any, device: str, dtype: str, batch_size: int
) -> None:
    gpus += capabilities
    chosen = choose(Settings(device=device))
    assert (chosen.settings.dtype, chosen.settings.batch_size) == (dtype, batch_size)
    assert chosen.settings.buckets[-1] == batch_size
    assert "float" in chosen.reasons["dtype"]
    assert str(batch_size) in chosen.reasons["batch_size"]


@pytest.mark.parametrize(
    ("device", "wanted", "compiles"), [("cuda", True, True), ("cuda", False, False), ("cpu", True, False)]
)
def test_blocks_are_compiled_where_it_is_asked_for_and_on_gpus_alone(
    gpus: list[tuple[int, int]], monkeypatch: pytest.MonkeyPatch, device: str, wanted: bool, compiles: bool
) -> None:
    class Loaded:
        is_compiled = False

        def compile_blocks(self) -> "Loaded":
            self.is_compiled = True
            return self

    gpus.append(HOPPER)
    monkeypatch.setattr(devices.Tokenizer, "load", lambda checkpoint, **options: Loaded())
    found: Any = devices.load_tokenizer(Settings(device=device, compile_blocks=wanted))
    assert found.is_compiled == compiles


def test_the_reason_names_the_gpu_that_decided(gpus: list[tuple[int, int]]) -> None:
    gpus += [HOPPER, TURING]
    reason = choose(Settings(device="cuda")).reasons["dtype"]
    assert "cuda:1" in reason
    assert "7.5" in reason


def test_what_is_set_stays(gpus: list[tuple[int, int]]) -> None:
    gpus.append(HOPPER)
    settings = Settings(device="cuda", dtype="float16", batch_size=3)
    chosen = choose(settings)
    assert chosen.settings == settings
    assert set(chosen.reasons.values()) == {"as set"}


def test_buckets_without_a_batch_size_end_in_it(gpus: list[tuple[int, int]]) -> None:
    chosen = choose(Settings(batch_buckets=(1, 4, 24)))
    assert chosen.settings.batch_size == 24
    assert "batch_buckets" in chosen.reasons["batch_size"]


def test_commands_on_files_are_exact(gpus: list[tuple[int, int]]) -> None:
    gpus.append(HOPPER)
    assert choose(Settings(device="cuda", **EXACT)).settings.dtype == "float32"  # type: ignore[arg-type]
