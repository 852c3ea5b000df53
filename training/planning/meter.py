"""Operations and kept memory of passes over networks that have shapes and no values (torch's fake tensors).

torch's `FlopCounterMode` counts operations, and `saved_tensors_hooks` the bytes that the forward pass keeps
for the backward pass.
"""

from collections import Counter
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode, flop_registry, sdpa_backward_flop_count, sdpa_flop_count

Operations = Counter[torch.dtype]  # two per multiply-add, by the precision of the products
_aten: Any = torch.ops.aten
# torch's counter knows CUDA's attention kernels only.
_CPU_ATTENTION: dict[Any, Callable[..., int]] = {
    _aten._scaled_dot_product_flash_attention_for_cpu: lambda q, k, v, *_, **__: sdpa_flop_count(
        q.shape, k.shape, v.shape
    ),
    _aten._scaled_dot_product_flash_attention_for_cpu_backward: lambda g, q, k, v, *_, **__: (
        sdpa_backward_flop_count(g.shape, q.shape, k.shape, v.shape)
    ),
}


def forget_values(*modules: nn.Module) -> None:
    """Within a `FakeTensorMode`: leave every parameter and buffer a shape and a dtype alone."""
    for module in {part for top in modules for part in top.modules()}:
        for name, p in module._parameters.items():
            if p is not None:
                empty = torch.empty(p.shape, dtype=p.dtype, device="cpu")
                module._parameters[name] = nn.Parameter(empty, p.requires_grad)
        for name, b in module._buffers.items():
            if b is not None:
                module._buffers[name] = torch.empty(b.shape, dtype=b.dtype, device="cpu")


class Meter:
    """Operations, and bytes that the forward pass keeps, within the context of `modes`."""

    def __init__(self, own: Iterable[Tensor]) -> None:
        self._own = {tensor.untyped_storage()._cdata for tensor in own}
        self._kept: dict[int, int] = {}
        self.total = Operations()

    @property
    def num_bytes(self) -> int:
        return sum(self._kept.values())

    @property
    def largest_bytes(self) -> int:
        return max(self._kept.values(), default=0)

    def modes(self) -> ExitStack:
        """The contexts that count."""
        counters = {op: self._tallied(count) for op, count in (flop_registry | _CPU_ATTENTION).items()}
        stack = ExitStack()
        stack.enter_context(FlopCounterMode(display=False, custom_mapping=counters))
        stack.enter_context(saved_tensors_hooks(self.keep, lambda tensor: tensor))
        return stack

    def keep(self, tensors: Any) -> Any:
        """Count the storages of tensors, but for the networks' own."""
        for storage in (tensor.untyped_storage() for tensor in tree_leaves(tensors)):
            if storage._cdata not in self._own:
                self._kept[storage._cdata] = storage.nbytes()
        return tensors

    def _tallied(self, count: Callable[..., int]) -> Callable[..., int]:
        def tally(*args: Any, out_val: Any = None, **kwargs: Any) -> int:
            operations = count(*args, **kwargs, out_val=out_val)
            result = next(leaf for leaf in tree_leaves(out_val) if leaf is not None)
            self.total[result.dtype] += operations
            return operations

        tally._get_raw = True  # type: ignore[attr-defined] # torch's mark of counters that take tensors
        return tally
