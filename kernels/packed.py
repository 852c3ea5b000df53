"""Weights packed once for products on a CPU, through oneDNN.

The products then read the weights in the order of their blocks, and add the bias and apply an activation
function on the way: about a fifth faster in all than PyTorch's own products (docs/performance.md).

Shape legend: T tokens (any leading dimensions), I input width, O output width.
"""

import platform
from dataclasses import dataclass
from typing import Literal, Self

import torch
import torch.nn.functional as F
from torch import Tensor

Activation = Literal["none", "gelu", "gelu_tanh"]
# oneDNN's names of the function and of its approximation.
_NAMES: dict[Activation, tuple[str, str]] = {
    "none": ("none", ""),
    "gelu": ("gelu", "none"),
    "gelu_tanh": ("gelu", "tanh"),
}


@dataclass(frozen=True)
class PackedWeight:
    """A copy of a float32 weight [O, I] in oneDNN's order: an opaque tensor."""

    packed: Tensor

    @classmethod
    def of(cls, weight: Tensor) -> Self | None:
        """The packed weight; None where packing does not serve: elsewhere than on x86, or in another type."""
        if weight.device.type != "cpu" or weight.dtype != torch.float32 or not _is_x86_with_onednn():
            return None
        return cls(torch.ops.mkldnn._reorder_linear_weight(weight.detach()))

    def __deepcopy__(self, memo: dict[int, object]) -> Self:
        return self  # it never changes, and an opaque tensor cannot be copied

    def linear(self, tokens: Tensor, bias: Tensor | None, activation: Activation = "none") -> Tensor:
        """``activation(x W^T + b)`` without gradients: float32 tokens [T, I] to [T, O]."""
        name, algorithm = _NAMES[activation]
        output: Tensor = torch.ops.mkldnn._linear_pointwise(tokens, self.packed, bias, name, [], algorithm)
        return output


@dataclass(frozen=True)
class LinearMap:
    """``x W^T + b`` of weights that stay, [T, I] -> [T, O]; packed where that serves.

    The bias may have more precision than the weight; the sum then has it too.
    """

    weight: Tensor
    bias: Tensor | None
    packed: PackedWeight | None = None

    def __call__(self, tokens: Tensor) -> Tensor:
        if self.packed is not None:
            return self.packed.linear(tokens, self.bias)
        output = F.linear(tokens, self.weight)
        return output if self.bias is None else output + self.bias


def _is_x86_with_onednn() -> bool:
    return torch.backends.mkldnn.is_available() and platform.machine() in ("x86_64", "AMD64")
