"""The fused operator: packs folded experts for the Triton kernels, and launches them.

Shape legend: B batch, N tokens per image, T = B * N, L layers, C token width, R = min(H, C) basis rows,
P logit columns.
"""

import itertools
import math
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from kernels import device_code
from kernels.dispatch import KERNEL_DTYPES, shape_obstacle
from kernels.launches import (
    H100,
    FusedProblem,
    Gpu,
    logit_columns,
    padded_basis_rows,
    plan_launches,
    router_terms,
)
from kernels.operands import FoldedExperts, Fused, FusionSpec, check_hidden_states, check_weights_match

ALIGNED_BYTES = 16
FP8_LARGEST = 448  # of e4m3
FP8_TOKEN_UNITS = device_code.FP8_TOKEN_UNITS.value


@dataclass(frozen=True)
class PackedExperts:
    """`FoldedExperts` in the form that the kernels read; matrices in the model's dtype, vectors float32.

    The basis is ``V^T hidden``, from the singular value decomposition ``factor = U S V^T``. Rotating
    ``hidden`` leaves ``|hidden x|`` alone and makes ``|product x|^2 = |S basis x|^2`` diagonal: one
    projection gives both norms.
    """

    basis: Tensor  # [L, R, C], rows padded with zeros to whole tiles; e4m3 for norms in FP8
    basis_sum: Tensor  # [L, R], sums of the rounded rows; for norms in FP8 the unit of each row's products
    basis_energy: Tensor  # [L, R], S^2
    constants: Tensor  # [4, L]: hidden_scale, output_eps, |shift|^2, the router's unit
    product: Tensor  # [L, C, C]
    product_sum: Tensor  # [L, C], sums of the rounded rows
    shift: Tensor  # [L, C], empty where no expert has one
    cross: Tensor  # [L, C], product^T shift; its sum is zero, so that a token's mean does not matter
    router: Tensor  # [L, terms * P, C], in units of a power of two
    router_sum: Tensor  # [L, terms * P], sums of the rounded rows
    router_bias: Tensor  # [P]

    @property
    def num_layers(self) -> int:
        return self.product.shape[0]

    @property
    def width(self) -> int:
        return self.product.shape[1]

    @property
    def has_shift(self) -> bool:
        return self.shift.numel() > 0


def pack_experts(
    folded: FoldedExperts, device: torch.device | str, dtype: torch.dtype, fp8_norms: bool = False
) -> PackedExperts:
    """Make the kernels' operands.

    Args:
        folded: in float64, as `model.networks.folding.fold_experts` gives it.
        device: where the hidden states will be.
        dtype: of the hidden states.
        fp8_norms: whether the norms of the experts' outputs are taken in FP8; the outputs never are.

    Raises:
        ValueError: a shape that the kernels do not take, or an LN_bb with an affine part.
    """
    if folded.norm_weight is not None or folded.norm_bias is not None:
        raise ValueError("the Triton kernels take LN_bb without affine part only")
    if reason := shape_obstacle(folded.width, folded.num_layers):
        raise ValueError(reason)
    _, singular_values, rotation = torch.linalg.svd(folded.factor, full_matrices=False)
    basis = rotation @ folded.hidden
    padding = padded_basis_rows(basis.shape[1], folded.width) - basis.shape[1]
    basis = torch.nn.functional.pad(basis, (0, 0, 0, padding))
    basis, basis_sum = _fp8_rows(basis) if fp8_norms else _rounded_rows(basis, dtype)
    energy = torch.nn.functional.pad(singular_values.square(), (0, padding))

    num_layers = folded.num_layers
    router, unit = _router_terms(folded, dtype)
    bias = torch.nn.functional.pad(folded.router_bias, (0, logit_columns(num_layers) - num_layers))
    product, product_sum = _rounded_rows(folded.product, dtype)

    shift = folded.product.new_zeros(num_layers, folded.width) if folded.shift is None else folded.shift
    cross = (folded.product.mT @ shift[:, :, None]).squeeze(-1)
    shift_energy = shift.square().sum(dim=1)
    units = torch.full_like(shift_energy, unit)
    constants = torch.stack([folded.hidden_scale, folded.output_eps, shift_energy, units])

    def vector(tensor: Tensor) -> Tensor:
        return tensor.to(device=device, dtype=torch.float32).contiguous()

    def matrix(tensor: Tensor) -> Tensor:
        return tensor.to(device=device, dtype=dtype).contiguous()

    return PackedExperts(
        basis=basis.to(device).contiguous(),
        basis_sum=vector(basis_sum),
        basis_energy=vector(energy),
        constants=vector(constants),
        product=matrix(product),
        product_sum=vector(product_sum),
        shift=vector(shift if folded.shift is not None else shift[:0]),
        cross=vector(cross),
        router=matrix(router),
        router_sum=vector(router.double().sum(dim=2)),
        router_bias=vector(bias),
    )


def _rounded_rows(matrices: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Matrices [L, R, C] in ``dtype``, and the sums of their rows as they were rounded."""
    rounded = matrices.to(dtype)
    return rounded, rounded.double().sum(dim=2)


def _fp8_rows(matrices: Tensor) -> tuple[Tensor, Tensor]:
    """Matrices [L, R, C] in e4m3, each row in a unit of its own, and the units of the rows' products."""
    units = matrices.abs().amax(dim=2).clamp_min(1e-30) / FP8_LARGEST
    return (matrices / units[:, :, None]).to(torch.float8_e4m3fn), units / FP8_TOKEN_UNITS


def _router_terms(folded: FoldedExperts, dtype: torch.dtype) -> tuple[Tensor, float]:
    """The router as a sum of terms in ``dtype``, [L, terms * P, C], in units of a power of two.

    The largest entry becomes about 2^12: float16 then holds the small ones too.
    """
    num_layers, columns = folded.num_layers, logit_columns(folded.num_layers)
    largest = float(folded.router_weight.abs().max())
    unit = 2.0 ** (math.ceil(math.log2(largest)) - 12) if largest > 0 else 1.0
    rest = folded.router_weight.new_zeros(num_layers, columns, folded.width)
    rest[:, :num_layers] = folded.router_weight.unflatten(1, (num_layers, -1)).transpose(0, 1) / unit
    terms = []
    for _ in range(router_terms(dtype, num_layers)):
        terms.append(rest.to(dtype))
        rest = rest - terms[-1].double()
    return torch.cat(terms, dim=1), unit


def fuse_layers(hidden_states: Sequence[Tensor], packed: PackedExperts, spec: FusionSpec) -> Fused:
    """The fusion on the GPU; equals `kernels.reference.fuse_layers` on the unpacked experts.

    Hidden states that lie evenly apart, as the encoder writes them, are read in place, whatever their batch
    and token strides; others are copied into one buffer first. No other tensor of T * L * C
    or T * L * H elements is made: the scratch is the sums, ``[splits, T, C]`` in float32, and a few
    numbers per token and layer. Safe to capture in a CUDA graph, and opaque to ``torch.compile``.

    Args:
        hidden_states: z^(k) of the L fused layers, shallow to deep, each [B, N, C], not normalised;
            views that skip prefix tokens are fine, the channels must be contiguous.
        packed: operands, on the same device and of the same dtype.
        spec: scalars; the same that the experts were folded with.

    Returns:
        z_final, in the hidden states' dtype, and the router weights in float32.

    Raises:
        ValueError: shapes, strides, devices or dtypes that do not go together.
    """
    check_hidden_states(hidden_states, packed.num_layers, packed.width)
    check_weights_match(hidden_states, packed.product)
    _check_readable(hidden_states)
    operands = [getattr(packed, field.name) for field in fields(packed)]
    tokens, router_weights = _fuse_layers(
        list(hidden_states),
        operands,
        spec.routing,
        spec.router_input_norm,
        spec.correction,
        spec.beta,
        spec.energy_eps,
        spec.hidden_norm_eps,
        spec.norm_eps,
    )
    return Fused(tokens, router_weights)


@torch.library.custom_op("drorae::fuse_layers", mutates_args=())
def _fuse_layers(
    hidden_states: Sequence[Tensor],
    operands: Sequence[Tensor],
    routing: str,
    router_input_norm: bool,
    correction: str,
    beta: float,
    energy_eps: float,
    hidden_norm_eps: float,
    norm_eps: float,
) -> tuple[Tensor, Tensor]:
    packed = PackedExperts(*operands)
    state = hidden_states[0]
    num_images, tokens_per_image, width = state.shape
    num_tokens, num_layers = num_images * tokens_per_image, packed.num_layers
    out = torch.empty(num_images, tokens_per_image, width, dtype=state.dtype, device=state.device)
    weights = torch.empty(num_images, tokens_per_image, num_layers, dtype=torch.float32, device=state.device)
    if num_tokens == 0:
        return out, weights

    def scratch(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.float32, device=state.device)

    problem = FusedProblem(
        num_tokens=num_tokens,
        num_layers=num_layers,
        width=width,
        basis_rows=packed.basis.shape[1],
        dtype=state.dtype,
        has_shift=packed.has_shift,
        router_input_norm=router_input_norm,
        routing=routing,
        correction=correction,
        fp8_norms=packed.basis.dtype == torch.float8_e4m3fn,
    )
    plan = plan_launches(problem, _gpu(state.device))
    mean, rstd, overlap, scale, tail = (scratch(num_layers, num_tokens) for _ in range(5))
    logits = scratch(num_layers, num_tokens, logit_columns(num_layers))
    energy = scratch(2, plan["measure"].constants["SPLITS"], num_layers, num_tokens)
    partial = scratch(plan["finish"].constants["SPLITS"], num_tokens, width)
    states, stride_layer = _as_one(hidden_states)
    where = (num_tokens, tokens_per_image, states.stride(0), states.stride(1), stride_layer)
    router = (packed.router, packed.router_sum, packed.cross)
    basis = (packed.basis, packed.basis_sum, packed.basis_energy)
    factors = (mean, scale, tail)

    def launch(name: str, *arguments: Any) -> None:
        getattr(device_code, name)[plan[name].grid](*arguments, **plan[name].arguments())

    with _on(state.device):
        launch("measure", states, *router, *basis, logits, mean, rstd, overlap, energy, *where, norm_eps)
        inputs = (logits, packed.router_bias, packed.constants, energy, overlap, rstd)
        launch("route", *inputs, weights, scale, tail, num_tokens, energy_eps, hidden_norm_eps)
        weighted = (packed.product, packed.product_sum, packed.shift, *factors)
        launch("combine", states, *weighted, partial, *where)
        launch("finish", partial, states, out, *where, beta, norm_eps)
    return out, weights


@_fuse_layers.register_fake
def _(hidden_states: Sequence[Tensor], operands: Sequence[Tensor], *scalars: Any) -> tuple[Tensor, Tensor]:
    state = hidden_states[0]
    weights = state.new_empty((*state.shape[:2], len(hidden_states)), dtype=torch.float32)
    return state.new_empty(state.shape), weights


def _check_readable(hidden_states: Sequence[Tensor]) -> None:
    first = hidden_states[0]
    if first.dtype not in KERNEL_DTYPES:
        raise ValueError(f"the Triton kernels take float32, bfloat16 and float16, not {first.dtype}")
    for layer, state in enumerate(hidden_states):
        if state.stride(2) != 1:
            raise ValueError(
                f"hidden state {layer} has strides {list(state.stride())}: the channels must be contiguous"
            )
        if state.stride() != first.stride():
            raise ValueError(
                f"hidden state {layer} has strides {list(state.stride())}, "
                f"hidden state 0 has {list(first.stride())}: the Triton kernels read all alike"
            )


def _as_one(hidden_states: Sequence[Tensor]) -> tuple[Tensor, int]:
    """The first layer's states, and elements from each layer to the next; copies where they lie unevenly."""
    first = hidden_states[0]
    starts = [state.data_ptr() for state in hidden_states]
    steps = {after - before for before, after in itertools.pairwise(starts)} or {0}
    step = steps.pop()
    if not steps and step % ALIGNED_BYTES == 0:
        return first, step // first.itemsize
    copied = torch.stack(list(hidden_states))
    return copied[0], copied.stride(0)


def _gpu(device: torch.device) -> Gpu:
    if device.type != "cuda":
        return H100
    found = torch.cuda.get_device_properties(device)
    return Gpu(found.major, found.multi_processor_count)


def _on(device: torch.device) -> AbstractContextManager[Any]:
    """Triton launches on the current device: make it that of the tensors."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()
