"""Inputs and results of the fusion operator, the same for every implementation.

Shape legend: B batch, N tokens per image, T = B * N, L fused layers, C token width, H expert hidden
width, R = min(H, C) rows of a folded expert's hidden factor.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Literal, NamedTuple, Self

import torch
from torch import Tensor


@dataclass(frozen=True)
class FusionSpec:
    """The fusion's scalars (arXiv 2605.10780, section 3)."""

    routing: Literal["energy", "softmax"] = "energy"
    router_input_norm: bool = True
    correction: Literal["incremental", "replace"] = "incremental"
    beta: float = 0.2
    energy_eps: float = 1e-6
    hidden_norm_eps: float = 1e-5
    norm_eps: float = 1e-6


@dataclass(frozen=True)
class ExpertWeights:
    """Experts and router as trained: ``y = down LayerNorm_H(up x; gain, shift)``, ``w = R x + r0``.

    ``norm_weight`` and ``norm_bias`` are LN_bb's affine part, [C] each; None is the paper's plain LN_bb.
    """

    up: Sequence[Tensor]  # L x [H, C]
    gain: Sequence[Tensor]  # L x [H]
    shift: Sequence[Tensor]  # L x [H]
    down: Sequence[Tensor]  # L x [C, H]
    router_weight: Tensor  # [L, L * C]
    router_bias: Tensor  # [L]
    norm_weight: Tensor | None = None
    norm_bias: Tensor | None = None

    @property
    def num_layers(self) -> int:
        return len(self.up)

    @property
    def width(self) -> int:
        return self.up[0].shape[1]

    @property
    def hidden_width(self) -> int:
        return self.up[0].shape[0]


@dataclass(frozen=True)
class FoldedExperts:
    """Experts folded for inference; `model.networks.folding.fold_experts` derives every field.

    With ``x`` the token normalised without affine part (zero mean, divided by sigma_in), layer k gives

    - ``p = hidden_k x + hidden_bias_k``, ``s^2 = hidden_scale_k |p|^2 + hidden_norm_eps``;
    - ``a = product_k x + product_bias_k + s shift_k``, ``h_k = a / sqrt(|a|^2 / C + output_eps_k s^2)``.

    ``product_k = factor_k hidden_k``. Each layer's matrices are scaled by a power of two to entries of
    ordinary size, so that float16 holds them; ``hidden_scale`` and ``output_eps`` carry the scales.
    """

    hidden: Tensor  # [L, R, C], upper triangular
    hidden_bias: Tensor | None  # [L, R], None for a plain LN_bb
    factor: Tensor  # [L, C, R]
    product: Tensor  # [L, C, C]
    product_bias: Tensor | None  # [L, C], None for a plain LN_bb
    shift: Tensor | None  # [L, C], None where every LayerNorm_H has a zero shift
    hidden_scale: Tensor  # [L]
    output_eps: Tensor  # [L]
    router_weight: Tensor  # [L, L * C]
    router_bias: Tensor  # [L]
    norm_weight: Tensor | None  # [C]
    norm_bias: Tensor | None  # [C]

    @property
    def num_layers(self) -> int:
        return self.product.shape[0]

    @property
    def width(self) -> int:
        return self.product.shape[1]

    def to(self, device: torch.device | str, dtype: torch.dtype) -> Self:
        """For inference: experts' matrices in ``dtype``, the rest in float32 (float64 for float64)."""
        exact = torch.promote_types(dtype, torch.float32)
        moved: dict[str, Tensor] = {}
        for field in fields(self):
            tensor = getattr(self, field.name)
            if tensor is not None:
                moved[field.name] = tensor.to(device=device, dtype=dtype if tensor.ndim == 3 else exact)
        return replace(self, **moved)


class Fused(NamedTuple):
    """Results of the operator."""

    tokens: Tensor
    """z_final, [B, N, C], in the hidden states' dtype."""
    router_weights: Tensor
    """w, [B, N, L]: raw for energy routing, after the softmax for softmax routing."""


def check_hidden_states(hidden_states: Sequence[Tensor], num_layers: int, width: int) -> None:
    """Refuse hidden states that no implementation can fuse.

    Args:
        hidden_states: z^(k), each [B, N, C]; strided views are fine.
        num_layers: L of the weights.
        width: C, likewise.

    Raises:
        ValueError: a wrong count, shape or dtype, or layers that differ in shape, dtype or device.
    """
    if len(hidden_states) != num_layers:
        raise ValueError(f"got {len(hidden_states)} hidden states, the fusion has {num_layers} layers")
    first = hidden_states[0]
    if first.ndim != 3 or first.shape[-1] != width:
        raise ValueError(f"hidden states have shape {list(first.shape)}, expected [B, N, {width}]")
    if not first.is_floating_point():
        raise ValueError(f"hidden states have dtype {first.dtype}, expected floating point")
    for layer, state in enumerate(hidden_states[1:], start=1):
        for name in ("shape", "dtype", "device"):
            found, wanted = getattr(state, name), getattr(first, name)
            if found != wanted:
                raise ValueError(f"hidden state {layer} has {name} {found}, hidden state 0 has {wanted}")


def check_weights_match(hidden_states: Sequence[Tensor], weight: Tensor) -> None:
    """Refuse weights on another device or of another dtype than the hidden states.

    Raises:
        ValueError: they differ; names both.
    """
    state = hidden_states[0]
    if (weight.device, weight.dtype) != (state.device, state.dtype):
        raise ValueError(
            f"the fusion's weights are {weight.dtype} on {weight.device}, "
            f"the hidden states {state.dtype} on {state.device}"
        )
