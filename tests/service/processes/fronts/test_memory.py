"""The memory that fronts and engine share."""

import mmap
import os
from collections.abc import Iterator

import pytest
import torch

from service.engine.operations import DECODE, ENCODE
from service.processes.children import share_memory
from service.processes.fronts.memory import Arena, Ledger, Placed, ledger_bytes

KIB = 2**10
MIB = 2**20


@pytest.fixture
def descriptor() -> Iterator[int]:
    number = share_memory("drorae-test", 256 * MIB)
    yield number
    os.close(number)


def test_places_do_not_overlap_and_are_used_again(descriptor: int) -> None:
    arena = Arena(descriptor)
    first, second, third = (arena.take(100 * KIB) for _ in range(3))
    assert (first, second, third) == (0, 128 * KIB, 256 * KIB)
    arena.give_back(128 * KIB)
    assert arena.take(200 * KIB) == 384 * KIB  # no room between the others
    assert arena.take(1) == 128 * KIB
    assert arena.take(64 * KIB) == 192 * KIB
    assert arena.take(256 * MIB) is None


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("interleaved", [False, True])
def test_a_tensor_is_the_same_on_the_other_side(
    descriptor: int, dtype: torch.dtype, interleaved: bool
) -> None:
    tensor = torch.arange(2 * 3 * 5 * 7).view(2, 3, 5, 7).to(dtype)
    if interleaved:
        tensor = tensor.contiguous(memory_format=torch.channels_last)
    placed = Placed.like(64 * KIB, tensor.shape, tensor[0])
    assert placed.interleaved == interleaved
    Arena(descriptor).view(placed).copy_(tensor)
    received = Arena(descriptor).view(placed)
    assert torch.equal(received, tensor)
    assert received.stride() == tensor.stride()


@pytest.mark.skipif(not hasattr(mmap, "MADV_REMOVE"), reason="the system cannot take shared memory back")
def test_memory_beyond_what_is_kept_goes_back(descriptor: int) -> None:
    arena = Arena(descriptor)
    placed = Placed(arena.take(200 * MIB) or 0, [200 * MIB], "uint8", False)
    arena.view(placed).fill_(1)
    assert os.fstat(descriptor).st_blocks * 512 >= 200 * MIB
    arena.give_back(placed.at)
    assert os.fstat(descriptor).st_blocks * 512 <= 64 * MIB


def test_fronts_read_the_rates_that_the_engine_measures() -> None:
    descriptor = share_memory("drorae-test", ledger_bytes(3))
    engine, front = Ledger(descriptor, 3), Ledger(descriptor, 3)
    os.close(descriptor)
    engine.rates.record(ENCODE, 4, 2.0)
    assert front.rates.duration_s({ENCODE: 6, DECODE: 100}, 1) == 3.0
    front.tally(2).add("requests", 1)
    assert engine.tally().total("requests") == 1
