"""Follows what a step does without values: operations by precision, and every allocation."""

import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count


@dataclass(frozen=True)
class Operations:
    """In matrix products and convolutions, two a multiply-add, by the precision of their operands."""

    bfloat16: int = 0
    float32: int = 0

    @property
    def total(self) -> int:
        return self.bfloat16 + self.float32

    def __add__(self, other: "Operations") -> "Operations":
        return Operations(self.bfloat16 + other.bfloat16, self.float32 + other.float32)

    def __sub__(self, other: "Operations") -> "Operations":
        return Operations(self.bfloat16 - other.bfloat16, self.float32 - other.float32)

    def times(self, factor: int) -> "Operations":
        return Operations(self.bfloat16 * factor, self.float32 * factor)

    def over(self, divisor: int) -> "Operations":
        return Operations(self.bfloat16 // divisor, self.float32 // divisor)


class StepTracker(TorchDispatchMode):
    """Counts operations, and follows the bytes of every tensor that they make, within the context."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.live_bytes = 0
        self.peak_bytes = 0
        self.operations = Operations()
        self._sizes: dict[int, int] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if count := _count_operations(func, args, kwargs or {}, result):
            is_wide = next(leaf for leaf in tree_leaves(result) if leaf is not None).dtype == torch.float32
            self.operations += Operations(float32=count) if is_wide else Operations(bfloat16=count)
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._follow(leaf.untyped_storage())
        return result

    def ignore(self, tensors: Iterator[Tensor]) -> None:
        """Leave out tensors that were there before, which views would bring in."""
        for tensor in tensors:
            self._sizes.setdefault(tensor.untyped_storage()._cdata, 0)

    def _follow(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key in self._sizes:
            return
        self._sizes[key] = storage.nbytes()
        self.live_bytes += storage.nbytes()
        self.peak_bytes = max(self.peak_bytes, self.live_bytes)
        weakref.finalize(storage, self._forget, key)

    def _forget(self, key: int) -> None:
        self.live_bytes -= self._sizes.pop(key)


# torch's counter knows CUDA's attention kernels only; the CPU's take query, key and value in the same places.
_CPU_ATTENTION: dict[Any, Callable[..., int]] = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: lambda query, key, value, *_: sdpa_flop_count(
        query.shape, key.shape, value.shape
    ),
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: (
        lambda grad, query, key, value, *_: sdpa_backward_flop_count(
            grad.shape, query.shape, key.shape, value.shape
        )
    ),
}


def _count_operations(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> int:
    """Operations of one call, two a multiply-add; zero where it is no product."""
    packet = func._overloadpacket
    if packet in _CPU_ATTENTION:
        return int(_CPU_ATTENTION[packet](*args))
    counter = flop_registry.get(packet)
    return 0 if counter is None else int(counter(*args, **kwargs, out_val=result))
