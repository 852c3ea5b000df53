"""The folded fusion in plain PyTorch: the path of CPUs, and of all that the Triton kernels cannot take.

Shape legend: B batch, N tokens, C width, T = B * N, L layers, R rows of the hidden factor.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.operands import FoldedExperts, Fused, FusionSpec, check_hidden_states, check_weights_match
from kernels.packed import LinearMap, PackedWeight
from kernels.reference import aggregate, correct, token_norm

# The hidden factor is upper triangular. In four row blocks that each skip the zero columns on their
# left it costs 5/8 of a full product; more blocks save little, and thin products are slow.
NUM_TRIANGLE_BLOCKS = 4
MIN_BLOCK_ROWS = 96


@dataclass(frozen=True)
class LayerMaps:
    """The linear maps of one layer's expert.

    Attributes:
        product: ``product x + product_bias``.
        hidden: row blocks of ``hidden x + hidden_bias``, each with the first column that it reads.
    """

    product: LinearMap
    hidden: Sequence[tuple[int, LinearMap]]


def make_maps(folded: FoldedExperts, pack: bool = False) -> list[LayerMaps]:
    """The maps by layer, views of the operands; ``pack`` copies them into the order of CPU products."""
    return [_layer_maps(folded, layer, pack) for layer in range(folded.num_layers)]


def rows_of_block(num_rows: int) -> int:
    """Rows of each block but the last, of a hidden factor of ``num_rows``."""
    return max(MIN_BLOCK_ROWS, math.ceil(num_rows / NUM_TRIANGLE_BLOCKS))


def _layer_maps(folded: FoldedExperts, layer: int, pack: bool) -> LayerMaps:
    def linear_map(weight: Tensor, bias: Tensor | None) -> LinearMap:
        return LinearMap(weight, bias, PackedWeight.of(weight) if pack else None)

    hidden = folded.hidden[layer]
    block = rows_of_block(hidden.shape[0])
    blocks = []
    for start in range(0, hidden.shape[0], block):
        rows = slice(start, start + block)
        bias = None if folded.hidden_bias is None else folded.hidden_bias[layer, rows]
        blocks.append((start, linear_map(hidden[rows, start:], bias)))
    bias = None if folded.product_bias is None else folded.product_bias[layer]
    return LayerMaps(linear_map(folded.product[layer], bias), blocks)


def fuse_layers(
    hidden_states: Sequence[Tensor],
    folded: FoldedExperts,
    spec: FusionSpec,
    maps: Sequence[LayerMaps] | None = None,
) -> Fused:
    """The fusion with folded experts; equals `kernels.reference.fuse_layers` on the unfolded ones.

    Products run in the hidden states' dtype, everything between them in float32 (float64 for float64).

    Args:
        hidden_states: z^(k) of the L fused layers, shallow to deep, each [B, N, C], not normalised.
        folded: operands on the same device, with matrices of the same dtype.
        spec: scalars; the same that the experts were folded with.
        maps: of these experts, where they are made already.

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
    maps = maps or make_maps(folded)
    total_BNC = _weighted_sum(
        [x.flatten(0, 1) for x in plain], router_weights.flatten(0, 1), folded, spec, maps
    )
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
    plain: Sequence[Tensor],
    router_weights: Tensor,
    folded: FoldedExperts,
    spec: FusionSpec,
    maps: Sequence[LayerMaps],
) -> Tensor:
    """``sum_k w_k h_k`` without LN_bb's affine part, [T, C].

    Args:
        plain: x of each layer, [T, C]; two dimensions, so that a slice goes to a product as it lies.
        router_weights: w, [T, L].
        folded: operands.
        spec: scalars.
        maps: by layer.
    """
    exact = folded.output_eps.dtype
    energy_LT1 = torch.stack([_hidden_energy(x, of.hidden, exact) for x, of in zip(plain, maps, strict=True)])
    variance_LT1 = energy_LT1 * folded.hidden_scale[:, None, None] + spec.hidden_norm_eps
    floor_LT1 = variance_LT1 * folded.output_eps[:, None, None]
    deviation_LT1 = variance_LT1.sqrt()
    total_TC = torch.zeros_like(plain[0], dtype=exact)
    for layer, x in enumerate(plain):
        output = maps[layer].product(x)
        if folded.shift is not None:
            output = output.to(exact).addcmul_(deviation_LT1[layer], folded.shift[layer])
        inverse_norm = torch.rsqrt(_squared_norm(output, exact) / folded.width + floor_LT1[layer])
        total_TC.addcmul_(output, inverse_norm * router_weights[:, layer : layer + 1])
    return total_TC


def _hidden_energy(x: Tensor, blocks: Sequence[tuple[int, LinearMap]], exact: torch.dtype) -> Tensor:
    """``|hidden x + hidden_bias|^2``, [T, 1], one block of the triangle at a time."""
    norms = [torch.linalg.vector_norm(block(x[:, start:]), dim=-1, dtype=exact) for start, block in blocks]
    return _squared_norm(torch.stack(norms, dim=-1), exact)


def _squared_norm(tokens: Tensor, dtype: torch.dtype) -> Tensor:
    """``|t|^2`` over the last dimension, kept, summed in ``dtype``: one pass, no squared or widened copy."""
    return torch.linalg.vector_norm(tokens, dim=-1, keepdim=True, dtype=dtype).square_()
