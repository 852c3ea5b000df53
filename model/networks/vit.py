"""Shared by encoder and decoder: the transformer block, sin-cos positions and freezing.

Shape legend: B batch, T tokens (prefix included), C width, D head width.
"""

from collections.abc import Iterable
from types import MethodType
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels.packed import Activation
from model.config import MlpKind
from model.networks.linear import Linear


class Freezable(nn.Module):
    """A module that can be frozen: no gradients, and eval mode whatever ``.train()`` is called above it."""

    frozen: bool = False

    def freeze(self) -> Self:
        """Stop gradients and pin eval mode."""
        self.frozen = True
        self.requires_grad_(False)
        return self.eval()

    def unfreeze(self) -> Self:
        """Allow gradients and training mode again."""
        self.forget_derived()
        self.frozen = False
        self.requires_grad_(True)
        return self

    def train(self, mode: bool = True) -> Self:
        return super().train(mode and not self.frozen)

    def forget_derived(self) -> None:
        """Drop whatever was computed from the weights for inference; they are about to change."""

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self.forget_derived()
        super()._load_from_state_dict(*args, **kwargs)


class Attention(nn.Module):
    """Multi-head self-attention through SDPA. [B, T, C] -> [B, T, C]."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = Linear(width, 3 * width)
        self.out = Linear(width, width)

    def forward(self, tokens: Tensor) -> Tensor:
        qkv = self.qkv(tokens).unflatten(-1, (3, self.num_heads, -1))  # [B, T, 3, heads, D]
        query, key, value = qkv.permute(2, 0, 3, 1, 4)  # each [B, heads, T, D]
        mixed = F.scaled_dot_product_attention(query, key, value)
        return self.out(mixed.transpose(1, 2).flatten(2))


class Mlp(nn.Module):
    """Two linear maps with a GELU between them, exact or in its tanh approximation."""

    def __init__(self, width: int, hidden_width: int, activation: Activation = "gelu") -> None:
        super().__init__()
        self.activation = activation
        self.up = Linear(width, hidden_width)
        self.down = Linear(hidden_width, width)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.down(self.up(tokens, self.activation))


class SwiGlu(nn.Module):
    """``down(silu(gate x) * (value x))`` (arXiv 2002.05202); ``up`` holds gate and value, in this order."""

    def __init__(self, width: int, hidden_width: int) -> None:
        super().__init__()
        self.up = Linear(width, 2 * hidden_width)
        self.down = Linear(hidden_width, width)

    def forward(self, tokens: Tensor) -> Tensor:
        gate, value = self.up(tokens).chunk(2, dim=-1)
        return self.down(F.silu(gate) * value)


class Residual(nn.Module):
    """A residual branch added to the tokens."""

    def forward(self, tokens: Tensor, branch: Tensor, out: Tensor | None = None) -> Tensor:
        return torch.add(tokens, branch, out=out)


class LayerScale(nn.Module):
    """A residual branch added with a learned per-channel gain (CaiT), in one pass over memory."""

    def __init__(self, width: int, initial: float) -> None:
        super().__init__()
        self.gain = nn.Parameter(Tensor(width).fill_(initial))

    def forward(self, tokens: Tensor, branch: Tensor, out: Tensor | None = None) -> Tensor:
        return torch.addcmul(tokens, branch, self.gain, out=out)


class Block(nn.Module):
    """Pre-norm transformer block; ``layer_scale=None`` leaves the residual branches unscaled."""

    def __init__(
        self,
        width: int,
        num_heads: int,
        mlp_width: int,
        eps: float,
        layer_scale: float | None = None,
        mlp: MlpKind = "gelu",
    ) -> None:
        super().__init__()
        self.norm_attention = nn.LayerNorm(width, eps=eps)
        self.attention = Attention(width, num_heads)
        self.norm_mlp = nn.LayerNorm(width, eps=eps)
        self.mlp = _make_mlp(mlp, width, mlp_width)
        self.scale_attention = Residual() if layer_scale is None else LayerScale(width, layer_scale)
        self.scale_mlp = Residual() if layer_scale is None else LayerScale(width, layer_scale)

    def forward(self, tokens: Tensor, out: Tensor | None = None) -> Tensor:
        """The block's tokens, in ``out`` where one is given; that takes no gradients."""
        tokens = self.scale_attention(tokens, self.attention(self.norm_attention(tokens)))
        return self.scale_mlp(tokens, self.mlp(self.norm_mlp(tokens)), out)


def compile_blocks(blocks: Iterable[nn.Module], backend: str = "inductor") -> None:
    """Compile the forward passes of blocks, for inference: their element-wise work is fused.

    One compilation serves all blocks of one kind, and all batch sizes but 1.
    """
    import torch._dynamo.config as dynamo

    # Several GPUs in one process, and two kinds of blocks: the default of 8 would leave some uncompiled.
    dynamo.recompile_limit = max(dynamo.recompile_limit, 64)
    compiled = torch.compile(Block.forward, dynamic=True, fullgraph=True, backend=backend)
    for block in blocks:
        setattr(block, "forward", MethodType(compiled, block))  # noqa: B010 - a method of this one instance


def _make_mlp(kind: MlpKind, width: int, hidden_width: int) -> Mlp | SwiGlu:
    if kind == "swiglu":
        return SwiGlu(width, hidden_width)
    return Mlp(width, hidden_width, kind)


def sincos_positions(width: int, grid: int, span: int | None = None) -> Tensor:
    """Fixed 2-D sin-cos positions (MAE), columns in the first half of the channels.

    Args:
        width: C, divisible by 4.
        grid: patches along a side.
        span: how far apart the ends of a side are; by default one unit a patch, as in MAE and RAE.

    Returns:
        [1, 1 + grid * grid, width] float32; the class token's row is zero. On the meta device a shape alone:
        to trace these operations there, torch imports its compiler.
    """
    if torch.get_default_device().type == "meta":
        return torch.empty(1, 1 + grid * grid, width)
    frequencies = 10000.0 ** -(torch.arange(width // 4, dtype=torch.float64) / (width / 4))
    coordinates = torch.arange(grid, dtype=torch.float64) * ((span or grid) / grid)
    angles = torch.outer(coordinates, frequencies)
    axis = torch.cat([angles.sin(), angles.cos()], dim=1)  # [grid, width / 2]
    columns = axis[None, :, :].expand(grid, -1, -1)
    rows = axis[:, None, :].expand(-1, grid, -1)
    table = torch.cat([columns, rows], dim=-1).reshape(1, grid * grid, width)
    return torch.cat([torch.zeros(1, 1, width), table.float()], dim=1)


def initialize_linear(module: nn.Module) -> None:
    """ViT's initialisation, for ``Module.apply``: truncated normal of deviation 0.02, zero biases."""
    if isinstance(module, nn.Linear | nn.Conv2d):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
