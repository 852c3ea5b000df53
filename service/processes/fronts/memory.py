"""The memory that fronts and engine share: the ledger of all of them, and an arena for each front.

Shape legend: N items of a job, S image side.
"""

import bisect
import math
import mmap
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from model.images.tensors import dtype_name
from service.engine.rates import NUM_RATES, Rates
from service.processes.tally import ROW_BYTES, Tally
from service.settings import Settings

_RATES_BYTES = 8 * NUM_RATES
_BLOCK_BYTES = 64 * 2**10  # a multiple of every page size
_ITEM_BYTES = 32 * 2**20  # more than any image or latent has as float32
_KEPT_BYTES = 64 * 2**20
"""What of an arena stays when it is free; the rest goes back to the system."""


def ledger_bytes(num_fronts: int) -> int:
    """Size of a ledger."""
    return _RATES_BYTES + num_fronts * ROW_BYTES


class Ledger:
    """The measured rates, which the engine writes, then a row of the tally for each front, which that writes.

    Args:
        descriptor: of memory of `ledger_bytes`.
        num_fronts: as it was made for.
    """

    def __init__(self, descriptor: int, num_fronts: int) -> None:
        memory = memoryview(mmap.mmap(descriptor, ledger_bytes(num_fronts)))
        self.rates = Rates(memory[:_RATES_BYTES].cast("d"))
        self._rows = memory[_RATES_BYTES:]

    def tally(self, own: int = 0) -> Tally:
        """The tally, as the front of that index counts in it."""
        return Tally(self._rows, own)


@dataclass(frozen=True)
class Placed:
    """Where a tensor lies in an arena, and what it is.

    Attributes:
        at: its first byte.
        shape: [N, ...].
        dtype: its name.
        interleaved: whether the numbers of a pixel [N, 3, S, S] lie side by side.
    """

    at: int
    shape: Sequence[int]
    dtype: str
    interleaved: bool

    @classmethod
    def like(cls, at: int, shape: Sequence[int], sample: Tensor) -> "Placed":
        """A tensor of the type and layout of a sample [C, H, W]."""
        interleaved = sample.stride()[0] == 1 and sample.shape[0] > 1
        return cls(at, list(shape), dtype_name(sample.dtype), interleaved)


class Arena:
    """Memory for the inputs of one front's jobs, and then their results.

    Args:
        descriptor: of the whole memory.
    """

    def __init__(self, descriptor: int) -> None:
        self._memory = mmap.mmap(descriptor, 0)
        self._taken: list[tuple[int, int]] = []  # first byte and end, ascending

    def view(self, placed: Placed) -> Tensor:
        """The tensor, as long as nobody gives its place back."""
        dtype = getattr(torch, placed.dtype)
        flat = torch.frombuffer(self._memory, dtype=dtype, count=math.prod(placed.shape), offset=placed.at)
        if not placed.interleaved:
            return flat.view(*placed.shape)
        num_items, channels, *sides = placed.shape
        return flat.view(num_items, *sides, channels).permute(0, 3, 1, 2)

    def take(self, num_bytes: int) -> int | None:
        """The first byte of a free place; None where there is none."""
        wanted = -(-num_bytes // _BLOCK_BYTES) * _BLOCK_BYTES
        at = 0
        for begin, end in self._taken:
            if begin - at >= wanted:
                break
            at = end
        if at + wanted > len(self._memory):
            return None
        bisect.insort(self._taken, (at, at + wanted))
        return at

    def give_back(self, at: int) -> None:
        """Let others have a place."""
        begin, end = self._taken.pop(bisect.bisect_left(self._taken, (at, 0)))
        begin = max(begin, _KEPT_BYTES)
        if begin < end and hasattr(mmap, "MADV_REMOVE"):
            self._memory.madvise(mmap.MADV_REMOVE, begin, end - begin)


def arena_bytes(settings: Settings) -> int:
    """Size of an arena: all jobs that the limits allow fit in, also with gaps between them."""
    wanted = 2 * settings.queue_limit_bytes + settings.max_items_per_request * _ITEM_BYTES
    return -(-wanted // _BLOCK_BYTES) * _BLOCK_BYTES
