"""Counts against figures worked out by hand, and against what PyTorch sees the code do.

Shape legend: L layers, C width, H expert hidden width.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.cases import counts as counting
from benchmarks.cases.counts import FusionSize
from benchmarks.cases.fusions import IMPLEMENTATIONS, Operands, random_states
from benchmarks.cases.tokenizers import decode_operations, encode_operations
from model.config import PRESETS
from model.tokenizer import Tokenizer

UNREAD = {"empty", "empty_like", "zeros_like", "new_empty"}
UNMARKED_VIEWS = {"_unsafe_view"}


class TrafficMode(TorchDispatchMode):
    """Adds up the bytes of every tensor that an operation reads or writes; views move none."""

    def __init__(self) -> None:
        super().__init__()
        self.num_bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        operands = {name: value for name, value in (kwargs or {}).items() if name != "out"}
        name = func.overloadpacket.__name__
        is_view = any(argument.alias_info and not argument.is_write for argument in func._schema.arguments)
        if not is_view and name not in UNMARKED_VIEWS:
            self.num_bytes += total_bytes(result)
            if name not in UNREAD:
                self.num_bytes += total_bytes([*args, *operands.values()])
        return result


def total_bytes(value: Any) -> int:
    if isinstance(value, Tensor):
        return value.numel() * value.itemsize
    return sum(map(total_bytes, value)) if isinstance(value, list | tuple) else 0


def full_size(hidden_width: int, batch: int = 1) -> FusionSize:
    """DINOv2-B's tokens in bfloat16."""
    return FusionSize(batch, 256, 12, 768, hidden_width, element_bytes=2)


def experts_gflop(count: Callable[[FusionSize], int], size: FusionSize) -> float:
    """Without the router."""
    router = size.num_tokens * size.num_layers * counting.router_operations(size)
    return (count(size) - router) / 1e9


def build(name: str, dtype: torch.dtype = torch.float32, width: int = 64, hidden_width: int = 96) -> Any:
    """An implementation on one image of 256 tokens and three layers, and its size."""
    generator = torch.Generator().manual_seed(0)
    operands = Operands(3, width, hidden_width, torch.device("cpu"), dtype, generator)
    call = IMPLEMENTATIONS[name].build(operands, random_states(operands, 1, 256))
    return call, FusionSize(1, 256, 3, width, hidden_width, dtype.itemsize)


@pytest.mark.parametrize(("hidden_width", "gflop"), [(1536, 14.496), (3072, 28.991), (6144, 57.982)])
def test_definition_of_one_image(hidden_width: int, gflop: float) -> None:
    found = experts_gflop(counting.definition_operations, full_size(hidden_width))
    assert found == pytest.approx(gflop, abs=1e-3)


@pytest.mark.parametrize("hidden_width", [768, 1536, 3072, 6144])
def test_folded_is_three_c_squared_whatever_the_hidden_width(hidden_width: int) -> None:
    size = full_size(hidden_width)
    assert experts_gflop(counting.folded_operations, size) == 256 * 12 * 3 * 768**2 / 1e9
    assert experts_gflop(counting.folded_operations, size) == pytest.approx(5.436, abs=1e-3)
    assert counting.needed_operations(size) == counting.folded_operations(size)


def test_narrow_experts_need_less_unfolded() -> None:
    size = full_size(128)
    assert counting.needed_operations(size) == counting.definition_operations(size)
    assert experts_gflop(counting.definition_operations, size) == pytest.approx(1.208, abs=1e-3)
    assert experts_gflop(counting.folded_operations, size) == pytest.approx(4.178, abs=1e-3)


def test_fused_kernels_do_a_full_square_for_the_triangle() -> None:
    size = full_size(1536, batch=64)
    router = 2 * 16 * 768 * 2  # twelve layers' logits are padded to sixteen columns, of two terms each
    assert counting.fused_executed_operations(size) == 64 * 256 * 12 * (4 * 768**2 + router)


def test_bytes_of_64_images() -> None:
    size = full_size(1536, batch=64)
    tokens = 64 * 256 * 768 * 2
    weights = 2 * (12 * 768 * 768 * 3 // 2 + 144 * 768)
    assert counting.minimum_bytes(size) == 13 * tokens + weights
    scratch = 4 * (64 * 256 * (12 * 47 + 2 * 768))
    assert counting.fused_bytes(size) == 26 * tokens + 2 * 12 * (2 * 768**2 + 32 * 768) + scratch


@pytest.mark.parametrize(("name", "hidden_width"), [("definition", 96), ("folded", 96), ("folded", 24)])
def test_operations_are_those_of_the_code(name: str, hidden_width: int) -> None:
    call, size = build(name, hidden_width=hidden_width)
    with FlopCounterMode(display=False) as counter:
        call()
    assert counter.get_total_flops() == IMPLEMENTATIONS[name].operations(size)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["definition", "folded"])
def test_bytes_are_those_of_the_code(name: str, dtype: torch.dtype) -> None:
    call, size = build(name, dtype)
    moved_bytes = IMPLEMENTATIONS[name].moved_bytes
    assert moved_bytes is not None
    with torch.no_grad(), TrafficMode() as traffic:
        call()
    assert traffic.num_bytes == pytest.approx(moved_bytes(size), rel=0.1)


def test_encoder_and_decoder_count_what_they_do() -> None:
    config = PRESETS["mini"]
    tokenizer = Tokenizer(config).eval()
    # The counter knows attention by its two products only.
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        tokenizer.encode(torch.rand(1, 3, 256, 256), latent="base")
        encoded = counter.get_total_flops()
        tokenizer.decode(torch.randn(1, *config.latent_shape))
        decoded = counter.get_total_flops() - encoded
    assert encoded == encode_operations(config)
    assert decoded == decode_operations(config)


def test_full_size_encoder_and_decoder() -> None:
    config = PRESETS["dinov2-b"]
    # Encoder: 261 x 12 x (24 C^2 + 4 x 261 C), and 256 patches of 588 values. Decoder: 257 x 28 x (8 D^2 +
    # 4 x 4096 D + 4 x 257 D), and two linear maps between 768 and 1152.
    assert encode_operations(config) / 1e9 == pytest.approx(46.85 + 0.23, abs=0.01)
    assert decode_operations(config) / 1e9 == pytest.approx(220.74 + 2 * 0.453, abs=0.01)
