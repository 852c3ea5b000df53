"""The folded fusion in plain PyTorch: the path of CPUs, and of all that the Triton kernels cannot take.

Shape legend: B batch, N tokens, C width, T = B * N, L layers, R rows of the hidden factor.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.operands import FoldedExperts, Fused, FusionSpec, check_hidden_states, check_weights_match
from kernels.reference import aggregate, correct, token_norm

# The hidden factor is upper triangular. In four row blocks that each skip the zero columns on their
# left it costs 5/8 of a full product; more blocks save little and make the products thin.
NUM_TRIANGLE_BLOCKS = 4


def fuse_layers(hidden_states: Sequence[Tensor], folded: FoldedExperts, spec: FusionSpec) -> Fused:
    """The fusion with folded experts; equals `kernels.reference.fuse_layers` on the unfolded ones.

    Products run in the hidden states' dtype, everything between them in float32 (float64 for float64).

    Args:
        hidden_states: z^(k) of the L fused layers, shallow to deep, each [B, N, C], not normalised.
        folded: operands on the same device, with matrices of the same dtype.
        spec: scalars; the same that the experts were folded with.

    Returns:
        z_final, in the hidden states' dtype, and the router weights.

    Raises:
        ValueError: shapes, devices or dtypes that do not go together.
    """
    check_hidden_states(hidden_states, folded.num_layers, folded.width)
    check_weights_match(hidden_states, folded.product)
    affine = (folded.norm_weight, folded.norm_bias)
    plain = [token_norm(z, spec.norm_eps) for z in hidden_states]
    router_weights = _route(hidden_states, plain, folded, spec)
    total_BNC = _weighted_sum([x.flatten(0, 1) for x in plain], router_weights.flatten(0, 1), folded, spec)
    total_BNC = total_BNC.view(plain[0].shape)
    if folded.norm_weight is not None:
        total_BNC *= folded.norm_weight
    if folded.norm_bias is not None:
        total_BNC.addcmul_(router_weights.sum(dim=-1, keepdim=True), folded.norm_bias)
    fused = aggregate(total_BNC, router_weights, spec, *affine)
    base = token_norm(hidden_states[-1].to(total_BNC.dtype), spec.norm_eps, *affine)
    return Fused(correct(base, fused, spec, *affine).to(hidden_states[0].dtype), router_weights)


def _route(
    hidden_states: Sequence[Tensor], plain: Sequence[Tensor], folded: FoldedExperts, spec: FusionSpec
) -> Tensor:
    """Router weights, [B, N, L], summed layer by layer instead of over a concatenation of all layers.

    In the vectors' precision: outlier channels make each layer's share large, and the shares cancel.
    """
    exact = folded.router_weight.dtype
    weights_BNL = folded.router_bias
    for z, x, block in zip(
        hidden_states, plain, folded.router_weight.split(folded.width, dim=1), strict=True
    ):
        seen = (x if spec.router_input_norm else z).to(exact)
        if spec.router_input_norm and folded.norm_weight is not None:
            seen = seen * folded.norm_weight
        if spec.router_input_norm and folded.norm_bias is not None:
            seen = seen + folded.norm_bias
        weights_BNL = weights_BNL + F.linear(seen, block)
    return weights_BNL.softmax(dim=-1) if spec.routing == "softmax" else weights_BNL


def _weighted_sum(
    plain: Sequence[Tensor], router_weights: Tensor, folded: FoldedExperts, spec: FusionSpec
) -> Tensor:
    """``sum_k w_k h_k`` without LN_bb's affine part, [T, C].

    Args:
        plain: x of each layer, [T, C]; two dimensions, so that a slice goes to a product as it lies.
        router_weights: w, [T, L].
        folded: operands.
        spec: scalars.
    """
    exact = folded.output_eps.dtype
    energy_LT1 = torch.stack([_hidden_energy(x, folded, layer) for layer, x in enumerate(plain)])
    variance_LT1 = energy_LT1 * folded.hidden_scale[:, None, None] + spec.hidden_norm_eps
    floor_LT1 = variance_LT1 * folded.output_eps[:, None, None]
    deviation_LT1 = variance_LT1.sqrt()
    total_TC = torch.zeros_like(plain[0], dtype=exact)
    for layer, x in enumerate(plain):
        output = F.linear(x, folded.product[layer])
        if folded.product_bias is not None:
            output = output + folded.product_bias[layer]
        if folded.shift is not None:
            output = output.to(exact).addcmul_(deviation_LT1[layer], folded.shift[layer])
        inverse_norm = torch.rsqrt(_squared_norm(output, exact) / folded.width + floor_LT1[layer])
        total_TC.addcmul_(output, inverse_norm * router_weights[:, layer : layer + 1])
    return total_TC


def _hidden_energy(x: Tensor, folded: FoldedExperts, layer: int) -> Tensor:
    """``|hidden x + hidden_bias|^2``, [T, 1], one block of the triangle at a time."""
    exact = folded.output_eps.dtype
    hidden = folded.hidden[layer]
    block = math.ceil(hidden.shape[0] / NUM_TRIANGLE_BLOCKS)
    norms = []
    for start in range(0, hidden.shape[0], block):
        rows = slice(start, start + block)
        projected = F.linear(x[:, start:], hidden[rows, start:])
        if folded.hidden_bias is not None:
            projected = projected + folded.hidden_bias[layer, rows]
        norms.append(torch.linalg.vector_norm(projected, dim=-1, dtype=exact))
    return _squared_norm(torch.stack(norms, dim=-1), exact)


def _squared_norm(tokens: Tensor, dtype: torch.dtype) -> Tensor:
    """``|t|^2`` over the last dimension, kept, summed in ``dtype``: one pass, no squared or widened copy."""
    return torch.linalg.vector_norm(tokens, dim=-1, keepdim=True, dtype=dtype).square_()
