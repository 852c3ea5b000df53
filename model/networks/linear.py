"""A linear map whose frozen weights can be packed once for products on a CPU (`kernels.packed`).

Shape legend: T tokens (any leading dimensions), I input width, O output width.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels.packed import Activation, PackedWeight


class Linear(nn.Linear):
    """``activation(x W^T + b)``, [T, I] -> [T, O].

    Packed weights serve inference in float32 on the CPU alone. A changed weight brings the plain map back.
    """

    _packed: PackedWeight | None = None
    _packed_state: tuple[int, int] | None = None

    def pack(self) -> None:
        """Keep a packed copy of the weight beside it, where that serves."""
        self._packed = PackedWeight.of(self.weight)
        self._packed_state = _state_of(self.weight)

    def forward(self, input: Tensor, activation: Activation = "none") -> Tensor:
        """The map, and the function of its results."""
        packed = self._packed
        if packed is not None and self._serves(input):
            return packed.linear(input, self.bias, activation)
        output = super().forward(input)
        if activation == "none":
            return output
        return F.gelu(output, approximate="tanh" if activation == "gelu_tanh" else "none")

    def _serves(self, input: Tensor) -> bool:
        """Whether the packed weight gives this result: eagerly, without gradients, in its own type."""
        if torch.compiler.is_compiling() or torch.is_grad_enabled() or torch.is_autocast_enabled("cpu"):
            return False
        if input.dtype != torch.float32:
            return False
        if self._packed_state != _state_of(self.weight):
            self._packed = None
            return False
        return True

    def __getstate__(self) -> dict[str, Any]:
        """Copies and pickles go without: a packed tensor is opaque."""
        return {name: value for name, value in self.__dict__.items() if not name.startswith("_packed")}


def pack_linear_maps(module: nn.Module) -> None:
    """Pack every `Linear` of a module whose weights will stay."""
    for part in module.modules():
        if isinstance(part, Linear):
            part.pack()


def _state_of(weight: Tensor) -> tuple[int, int]:
    """Where a weight lies and how often it was changed there."""
    return weight.data_ptr(), 0 if weight.is_inference() else weight._version
