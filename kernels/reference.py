"""The fusion's plain PyTorch definition; every faster path is tested against it.

Shape legend: B batch, N tokens, C width, H expert hidden width, L layers.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.operands import ExpertWeights, Fused, FusionSpec, check_hidden_states, check_weights_match


def fuse_layers(hidden_states: Sequence[Tensor], weights: ExpertWeights, spec: FusionSpec) -> Fused:
    """The whole operator as published: norms, experts, router, aggregation, correction.

    Args:
        hidden_states: z^(k) of the L fused layers, shallow to deep, each [B, N, C], not normalised.
        weights: experts and router, on the same device and of the same dtype.
        spec: scalars.

    Returns:
        z_final and the router weights, in the hidden states' dtype.

    Raises:
        ValueError: shapes, devices or dtypes that do not go together.
    """
    check_hidden_states(hidden_states, weights.num_layers, weights.width)
    check_weights_match(hidden_states, weights.router_weight)
    normalized = [token_norm(z, spec.norm_eps, weights.norm_weight, weights.norm_bias) for z in hidden_states]
    router_weights = route(hidden_states, normalized, weights, spec)
    fused = mix_experts(normalized, router_weights, weights, spec)
    return Fused(correct(normalized[-1], fused, spec, weights.norm_weight, weights.norm_bias), router_weights)


def token_norm(
    tokens: Tensor, eps: float, weight: Tensor | None = None, bias: Tensor | None = None
) -> Tensor:
    """LN_bb: the backbone's final LayerNorm over the last dimension, by default without its affine part.

    Args:
        tokens: [..., C].
        eps: added to the variance.
        weight: [C] or None.
        bias: [C] or None.

    Returns:
        [..., C], zero mean and unit variance per token (before an affine part).
    """
    return F.layer_norm(tokens, tokens.shape[-1:], weight, bias, eps)


def route(
    hidden_states: Sequence[Tensor], normalized: Sequence[Tensor], weights: ExpertWeights, spec: FusionSpec
) -> Tensor:
    """Router weights ``w = R [x_1; ...; x_L] + r0``, [B, N, L]; negative values suppress a layer."""
    seen = normalized if spec.router_input_norm else hidden_states
    weights_BNL = F.linear(torch.cat(list(seen), dim=-1), weights.router_weight, weights.router_bias)
    return weights_BNL.softmax(dim=-1) if spec.routing == "softmax" else weights_BNL


def mix_experts(
    normalized: Sequence[Tensor], router_weights: Tensor, weights: ExpertWeights, spec: FusionSpec
) -> Tensor:
    """z_fuse, [B, N, C]: ``h_k = LN_bb(down_k LayerNorm_H(up_k x_k))``, weighted and aggregated."""
    affine = (weights.norm_weight, weights.norm_bias)
    total_BNC = torch.zeros_like(normalized[0])
    experts = zip(weights.up, weights.gain, weights.shift, weights.down, strict=True)
    for layer, (tokens, expert) in enumerate(zip(normalized, experts, strict=True)):
        output = token_norm(expert_output(tokens, *expert, spec.hidden_norm_eps), spec.norm_eps, *affine)
        total_BNC = total_BNC + router_weights[..., layer : layer + 1] * output
    return aggregate(total_BNC, router_weights, spec, *affine)


def expert_output(
    tokens: Tensor, up: Tensor, gain: Tensor, shift: Tensor, down: Tensor, eps: float
) -> Tensor:
    """``y = down LayerNorm_H(up x; gain, shift)``, [..., C] to the same, without biases or activation."""
    return F.linear(F.layer_norm(F.linear(tokens, up), gain.shape, gain, shift, eps), down)


def aggregate(
    weighted_sum: Tensor,
    weights: Tensor,
    spec: FusionSpec,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
) -> Tensor:
    """z_fuse from ``sum_k w_k h_k`` and w by the configured routing, [B, N, C]."""
    if spec.routing == "softmax":
        return token_norm(weighted_sum, spec.norm_eps, norm_weight, norm_bias)
    return energy_aggregate(weighted_sum, weights, spec.energy_eps, spec.norm_eps, norm_weight, norm_bias)


def energy_aggregate(
    weighted_sum: Tensor,
    weights: Tensor,
    energy_eps: float,
    norm_eps: float,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
) -> Tensor:
    """Energy-constrained aggregation: ``LN_bb(sum_k w_k h_k / sqrt(sum_k w_k^2 + eps))``.

    Dividing by the weights' energy instead of a softmax keeps negative weights, with which the
    router suppresses a layer.

    Args:
        weighted_sum: ``sum_k w_k h_k``, [B, N, C].
        weights: w, [B, N, L].
        energy_eps: keeps an all-zero w finite.
        norm_eps: eps of LN_bb.
        norm_weight: LN_bb's scale, [C] or None.
        norm_bias: LN_bb's shift, [C] or None.

    Returns:
        z_fuse, [B, N, C].
    """
    energy = torch.sqrt(weights.square().sum(dim=-1, keepdim=True) + energy_eps)
    return token_norm(weighted_sum / energy, norm_eps, norm_weight, norm_bias)


def correct(
    base: Tensor,
    fused: Tensor,
    spec: FusionSpec,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
) -> Tensor:
    """z_final from z_base and z_fuse, each [B, N, C], by the configured correction."""
    if spec.correction == "replace":
        return fused
    return incremental_correction(base, fused, spec.beta, spec.norm_eps, norm_weight, norm_bias)


def incremental_correction(
    base: Tensor,
    fused: Tensor,
    beta: float,
    norm_eps: float,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
) -> Tensor:
    """``z_final = LN_bb(z_base + beta (z_fuse - z_base))``; ``beta = 0`` is z_base itself, bit for bit.

    Args:
        base: z_base, [B, N, C], already normalised.
        fused: z_fuse, [B, N, C].
        beta: size of the correction, in [0, 1].
        norm_eps: eps of LN_bb.
        norm_weight: LN_bb's scale, [C] or None.
        norm_bias: LN_bb's shift, [C] or None.

    Returns:
        z_final, [B, N, C].
    """
    if beta == 0:
        return base
    return token_norm(torch.lerp(base, fused, beta), norm_eps, norm_weight, norm_bias)
